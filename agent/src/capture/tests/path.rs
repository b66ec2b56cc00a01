//! Ways between two pods: those that the kernel lane may take, and those that it may not.

use std::{
    net::{IpAddr, SocketAddr, TcpListener},
    process::Command,
    time::{Duration, Instant},
};

use super::{
    node::{Node, UIDS, V4, V6, Wiring},
    world::{SOON, beside, can_run, connect_in, ip, next, serve},
};
use crate::capture::*;

/// Both pods in the mesh and served, as long as this lives.
struct Served {
    handle: Handle,
    tasks: Vec<tokio::task::JoinHandle<()>>,
    accepted: Vec<tokio::sync::mpsc::UnboundedReceiver<(SocketAddr, SocketAddr)>>,
}

impl Served {
    async fn start(node: &Node) -> Self {
        let handle = node.start().await;
        let (mut tasks, mut accepted) = (Vec::new(), Vec::new());
        for pod in [0, 1] {
            let (received, task) = serve(handle.attach(node.spec(pod)).await.unwrap());
            tasks.push(task);
            accepted.push(received);
        }
        Self { handle, tasks, accepted }
    }

    async fn prove(&self) -> Result<(), LaneFault> {
        let lane = self.handle.lane();
        tokio::time::timeout(2 * SOON, lane.prove_path(UIDS[0], UIDS[1])).await.expect("a bounded time")
    }

    async fn reason(&self) -> &'static str {
        self.prove().await.map_or_else(|fault| fault.reason(), |()| "none")
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        self.tasks.iter().for_each(tokio::task::JoinHandle::abort);
    }
}

#[test]
fn the_way_is_proven_over_a_bridge_and_over_routes_and_nothing_is_left_of_it() {
    if !can_run("the_way_is_proven_over_a_bridge_and_over_routes_and_nothing_is_left_of_it") {
        return;
    }
    for wiring in [Wiring::Bridge, Wiring::Routes] {
        let node = Node::new(wiring);
        node.run(async {
            let mut served = Served::start(&node).await;
            let lane = served.handle.lane();
            for uid in UIDS {
                assert_eq!(lane.prove_device(uid).await, Ok(()), "{wiring:?}");
            }
            // With tunnels to the pod open, and again, and all at once.
            let mut tunnels = Vec::new();
            for address in [V4[1], V6[1]] {
                let (a, to) = (node.netns(0), SocketAddr::new(address, 15_008));
                tunnels.push(beside(move || connect_in(&a, None, to)).await.unwrap());
                assert_eq!(next(&mut served.accepted[1]).await.0, to);
            }
            let started = Instant::now();
            assert_eq!(served.prove().await, Ok(()), "{wiring:?}");
            println!("{wiring:?}: proven in {:?}", started.elapsed());
            let many = (0..8).map(|turn| {
                let (lane, [from, to]) = (lane.clone(), if turn % 2 == 0 { [0, 1] } else { [1, 0] });
                tokio::spawn(async move { lane.prove_path(UIDS[from], UIDS[to]).await })
            });
            for proof in many.collect::<Vec<_>>() {
                assert_eq!(proof.await.unwrap(), Ok(()), "{wiring:?}");
            }
            assert_eq!(served.handle.node().maps.all_attested().unwrap(), []);
            assert!(served.accepted.iter_mut().all(|seen| seen.try_recv().is_err()), "no probe comes to a listener");
            for pod in [0, 1] {
                let sockets = ip(&format!("netns exec {} ss -tanH sport = :15008 or dport = :15008", node.ns(pod)));
                assert_eq!(sockets.lines().count(), tunnels.len(), "{sockets}");
            }
            let unknown = lane.prove_path(UIDS[0], "nobody").await.unwrap_err();
            assert_eq!(unknown.to_string(), "probe: pod nobody is not attached");
        });
    }
}

#[test]
fn a_pod_with_another_device_than_a_link_to_the_node_is_not_on_the_lane() {
    if !can_run("a_pod_with_another_device_than_a_link_to_the_node_is_not_on_the_lane") {
        return;
    }
    // What is done to the second pod, and what is found then.
    let cases: [(&str, &[&str], &str); 5] = [
        (
            "its addresses on a device of its own, reached over a link",
            &[
                "-n {pod} link add br0 type bridge",
                "-n {pod} addr del {v4}/32 dev eth0",
                "-n {pod} addr add {v4}/32 dev br0",
                "-n {pod} link set br0 up",
            ],
            "device: the pod is reached over several devices: eth0 (veth), br0 (bridge)",
        ),
        (
            "a macvlan",
            &[
                "-n {host} link del veth1",
                "-n {host} link add up0 type veth peer name up1",
                "-n {host} link set up0 up",
                "-n {host} link add link up0 name mac0 type macvlan",
                "-n {host} link set mac0 netns {pod} name eth0",
                "-n {pod} addr add {v4}/32 dev eth0",
                "-n {pod} addr add {v6}/128 dev eth0 nodad",
                "-n {pod} link set eth0 up",
                "-n {pod} route add default dev eth0",
            ],
            "device: eth0 of the pod is macvlan, no veth",
        ),
        (
            "a second way out",
            &[
                "-n {pod} link add eth1 type veth peer name eth1 netns {host}",
                "-n {pod} link set eth1 up",
                "-n {pod} route add default dev eth1 metric 900",
            ],
            "device: the pod is reached over several devices: eth0 (veth), eth1 (veth)",
        ),
        (
            "a link to somewhere else, whose indices are those of a link to the node",
            &[
                "-n {host} link del veth1",
                "netns exec {host} ip link add veth1 index 77 type veth peer name far0 index 78 netns {other}",
                "-n {host} link set veth1 up",
                "netns exec {pod} ip link add eth0 index 78 type veth peer name far1 index 77 netns {other}",
                "-n {pod} addr add {v4}/32 dev eth0",
                "-n {pod} addr add {v6}/128 dev eth0 nodad",
                "-n {pod} link set eth0 up",
            ],
            "device: the other end of the pod's eth0 is not on this node's own network",
        ),
        ("no device at all", &["-n {host} link del veth1"], "device: no device of the pod carries its addresses"),
    ];
    for (what, done, found) in cases {
        let node = Node::new(Wiring::Routes);
        node.run(async {
            let served = Served::start(&node).await;
            assert_eq!(served.prove().await, Ok(()), "{what}");
            for step in done {
                let step = step.replace("{pod}", &node.ns(1)).replace("{other}", &node.ns(0));
                let step = step.replace("{v4}", &V4[1].to_string()).replace("{v6}", &V6[1].to_string());
                ip(&step.replace("{host}", &node.host()));
            }
            let device = served.handle.lane().prove_device(UIDS[1]).await;
            assert_eq!(device.as_ref().map_err(LaneFault::to_string), Err(found.to_owned()), "{what}");
            assert_eq!(served.prove().await, device, "{what}");
            assert_eq!(served.handle.lane().prove_device(UIDS[0]).await, Ok(()), "{what}");
        });
    }
}

/// A device that leads to nobody.
fn elsewhere(ns: &str) {
    ip(&format!("-n {ns} link add up0 type veth peer name up1"));
    ip(&format!("-n {ns} link set up0 up"));
    ip(&format!("-n {ns} link set up1 up"));
}

#[test]
fn a_route_that_leads_elsewhere_in_either_direction_is_not_the_lanes() {
    if !can_run("a_route_that_leads_elsewhere_in_either_direction_is_not_the_lanes") {
        return;
    }
    let node = Node::new(Wiring::Routes);
    node.run(async {
        let served = Served::start(&node).await;
        let host = node.host();
        elsewhere(&host);
        for pod in [1, 0] {
            for (family, address, bits) in [("-4", V4[pod], 32), ("-6", V6[pod], 128)] {
                assert_eq!(served.prove().await, Ok(()));
                for lost in [format!("{address}/{bits} dev up0"), format!("unreachable {address}/{bits}")] {
                    ip(&format!("-n {host} {family} route del {address}/{bits}"));
                    ip(&format!("-n {host} {family} route add {lost}"));
                    let fault = served.prove().await.unwrap_err();
                    assert_eq!(fault.reason(), "route", "{lost}: {fault}");
                    assert!(fault.to_string().contains(&address.to_string()), "{fault}");
                    ip(&format!("-n {host} {family} route del {lost}"));
                    ip(&format!("-n {host} {family} route add {address}/{bits} dev veth{pod}"));
                }
            }
        }
        // Inside the pod: a route to the other that has a device of its own.
        let ns = node.ns(0);
        elsewhere(&ns);
        ip(&format!("-n {ns} route add {}/32 dev up0", V4[1]));
        assert_eq!(served.reason().await, "route");
    });
    let node = Node::new(Wiring::Bridge);
    node.run(async {
        let served = Served::start(&node).await;
        // On the bridge, but by way of a router there that is not the node.
        let (host, ns) = (node.host(), node.ns(0));
        ip(&format!("-n {ns} route add {}/32 via 10.214.7.1", V4[1]));
        assert_eq!(served.prove().await, Ok(()), "the node routes it back to the bridge");
        ip(&format!("-n {host} route add {}/32 via 10.214.7.9", V4[1]));
        assert_eq!(served.reason().await, "route");
    });
}

/// Loads rules into the node's netns; says so if it can't.
fn filter(node: &Node, rules: &str) -> bool {
    let run = Command::new("ip").args(["netns", "exec", &node.host(), "nft", rules]).output().unwrap();
    if !run.status.success() {
        println!("SKIPPED (nft: {}): {rules}", String::from_utf8_lossy(&run.stderr).trim());
    }
    run.status.success()
}

#[test]
fn what_changes_addresses_between_pods_or_lets_nothing_through_is_found() {
    if !can_run("what_changes_addresses_between_pods_or_lets_nothing_through_is_found") {
        return;
    }
    const NAT: &str = "add table inet n; add chain inet n post { type nat hook postrouting priority 100; }";
    const FILTER: &str = "add table inet n; add chain inet n pass { type filter hook forward priority 0; }";
    let cases = [
        (NAT, "add rule inet n post oifname veth1 masquerade", "rewritten"),
        (NAT, "add rule inet n post ip6 daddr fd0d:6865::3 masquerade", "rewritten"),
        // The address stays, the port does not.
        (NAT, "add rule inet n post ip daddr 10.214.7.3 tcp dport 15008 snat ip to 10.214.7.2:1024-1030", "rewritten"),
        (FILTER, "add rule inet n pass oifname veth1 reject", "probe"),
        (FILTER, "add rule inet n pass oifname veth1 drop", "probe"),
    ];
    for (chain, rule, reason) in cases {
        let node = Node::new(Wiring::Routes);
        node.run(async {
            let served = Served::start(&node).await;
            assert_eq!(served.prove().await, Ok(()), "{rule}");
            if !filter(&node, &format!("{chain}; {rule}")) {
                return;
            }
            let fault = served.prove().await.unwrap_err();
            println!("{rule}: {fault}");
            assert_eq!(fault.reason(), reason, "{fault}");
            assert!(filter(&node, "delete table inet n"));
            assert_eq!(served.prove().await, Ok(()), "{rule}");
            assert_eq!(served.handle.node().maps.all_attested().unwrap(), []);
        });
    }
}

#[test]
fn a_pods_own_processes_can_not_pass_for_the_way_to_it() {
    if !can_run("a_pods_own_processes_can_not_pass_for_the_way_to_it") {
        return;
    }
    let node = Node::new(Wiring::Routes);
    node.run(async {
        let served = Served::start(&node).await;
        let to = SocketAddr::new(V4[1], 15_008);
        // It connects to itself at that port all the time.
        let stop = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
        let noise = [(); 4].map(|()| {
            let (own, stopped) = (node.netns(1), std::sync::Arc::clone(&stop));
            std::thread::spawn(move || {
                while !stopped.load(std::sync::atomic::Ordering::Relaxed) {
                    let _refused = connect_in(&own, None, to);
                }
            })
        });
        for _ in 0..20 {
            assert_eq!(served.prove().await, Ok(()));
        }
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
        beside(move || noise.into_iter().for_each(|one| one.join().unwrap())).await;
        // It has the port itself: what it accepts is no proof.
        let taken: TcpListener = {
            let socket =
                node.netns(1).within(|| socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None));
            let socket = socket.unwrap();
            socket.bind(&SocketAddr::new(IpAddr::from([0, 0, 0, 0]), 15_008).into()).unwrap();
            socket.listen(16).unwrap();
            socket.into()
        };
        let started = Instant::now();
        let fault = served.prove().await.unwrap_err();
        assert_eq!(fault.reason(), "probe", "{fault}");
        assert!(fault.to_string().contains("in use"), "{fault}");
        assert!(started.elapsed() < Duration::from_secs(2), "told at once");
        drop(taken);
    });
}
