use super::{Unavailable, candidates, on_lane};
use crate::cluster::{Snapshot, fuzzing};

/// Nodes n1 and n2 in zone z1, n3 in zone z2, n4 nowhere; enrolled pods at 10.0.0.N.
fn cluster(spec: &str, endpoints: &str) -> Snapshot {
    let mut text = String::new();
    for (node, zone) in [("n1", "z1"), ("n2", "z1"), ("n3", "z2")] {
        text += &format!(
            "---\napiVersion: v1\nkind: Node\nmetadata: {{name: {node}, labels: {{topology.kubernetes.io/zone: {zone}}}}}\n"
        );
    }
    for (pod, node, mesh) in [(1, "n1", "enabled"), (2, "n1", "disabled"), (3, "n2", "enabled"), (4, "n3", "enabled")] {
        text += &format!(
            "---\napiVersion: v1\nkind: Pod\nmetadata: {{name: p{pod}, namespace: shop, labels: {{heddle.dev/mesh: {mesh}}}}}\n\
             spec: {{containers: [], nodeName: {node}}}\nstatus: {{podIPs: [{{ip: 10.0.0.{pod}}}, {{ip: 'fd00::{pod}'}}]}}\n"
        );
    }
    text += &format!(
        "---\napiVersion: v1\nkind: Service\nmetadata: {{name: web, namespace: shop}}\n\
         spec: {{clusterIPs: [10.96.0.1, 'fd96::1'], ports: [{{name: http, port: 80}}, {{name: admin, port: 81}}]{spec}}}\n\
         ---\napiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\n\
         metadata: {{name: web-4, namespace: shop, labels: {{kubernetes.io/service-name: web}}}}\n\
         addressType: IPv4\nports: [{{name: http, port: 8080}}]\nendpoints: [{endpoints}]\n"
    );
    fuzzing::snapshot(&text)
}

/// Last octets of what a client on `node` may be given, and which of them the kernel may choose.
fn found(snapshot: &Snapshot, node: &str) -> Result<(String, String), Unavailable> {
    let asked = "10.96.0.1".parse().unwrap();
    let all = candidates(snapshot, node, &snapshot.services["shop/web"], 80, asked)?;
    let last = |address: std::net::SocketAddr| address.ip().to_string().rsplit(['.', ':']).next().unwrap().to_owned();
    assert!(all.iter().all(|one| one.address.port() == 8080));
    let lane = on_lane(&all, node, asked).map(|(at, one)| {
        assert_eq!(&all[at], one);
        last(one.address)
    });
    let lane: Vec<String> = lane.collect();
    Ok((all.iter().map(|one| last(one.address)).collect::<Vec<_>>().join(" "), lane.join(" ")))
}

fn four(conditions: &str) -> String {
    (1..=4).map(|at| format!("{{addresses: [10.0.0.{at}]{conditions}}}")).collect::<Vec<_>>().join(", ")
}

fn ok(all: &str, lane: &str) -> Result<(String, String), Unavailable> {
    Ok((all.to_owned(), lane.to_owned()))
}

#[test]
fn every_ready_endpoint_may_be_chosen_and_the_kernel_chooses_the_enrolled_ones_of_its_node() {
    let snapshot = cluster("", &(four("") + ", {addresses: [192.168.0.9], nodeName: n1}"));
    // Pod 2 is not in the mesh; 9 is no pod.
    assert_eq!(found(&snapshot, "n1"), ok("1 2 3 4 9", "1"));
    assert_eq!(found(&snapshot, "n2"), ok("1 2 3 4 9", "3"));
    assert_eq!(found(&snapshot, "n4"), ok("1 2 3 4 9", ""));
    let of_port = |port| {
        let asked = "10.96.0.1".parse().unwrap();
        candidates(&snapshot, "n1", &snapshot.services["shop/web"], port, asked).map(|all| all.len())
    };
    assert_eq!((of_port(80), of_port(81)), (Ok(5), Err(Unavailable::NoneReady)));
    assert_eq!(of_port(82), Err(Unavailable::NoSuchPort));
}

#[test]
fn a_local_policy_takes_endpoints_of_the_node_or_none() {
    let snapshot = cluster(", internalTrafficPolicy: Local", &four(""));
    assert_eq!(found(&snapshot, "n1"), ok("1 2", "1"));
    assert_eq!(found(&snapshot, "n3"), ok("4", "4"));
    assert_eq!(found(&snapshot, "n4"), Err(Unavailable::NoneReady));
    // It is not a preference: where the node's endpoint is not ready, nobody else's is taken.
    let unready = "{addresses: [10.0.0.4], conditions: {ready: false}}, {addresses: [10.0.0.1]}";
    let snapshot = cluster(", internalTrafficPolicy: Local, trafficDistribution: PreferSameZone", unready);
    assert_eq!(found(&snapshot, "n3"), Err(Unavailable::NoneReady));
    assert_eq!(found(&snapshot, "n1"), ok("1", "1"));
}

#[test]
fn a_preference_holds_while_there_is_a_ready_endpoint_of_the_kind() {
    for preference in ["PreferClose", "PreferSameZone"] {
        let snapshot = cluster(&format!(", trafficDistribution: {preference}"), &four(""));
        assert_eq!(found(&snapshot, "n1"), ok("1 2 3", "1"), "{preference}");
        assert_eq!(found(&snapshot, "n2"), ok("1 2 3", "3"), "{preference}");
        assert_eq!(found(&snapshot, "n3"), ok("4", "4"), "{preference}");
        assert_eq!(found(&snapshot, "n4"), ok("1 2 3 4", ""), "a node without a zone prefers nothing");
        let unready = "{addresses: [10.0.0.4], conditions: {ready: false}}, {addresses: [10.0.0.1]}";
        let snapshot = cluster(&format!(", trafficDistribution: {preference}"), unready);
        assert_eq!(found(&snapshot, "n3"), ok("1", ""), "{preference}");
    }
    let snapshot = cluster(", trafficDistribution: PreferSameNode", &four(""));
    assert_eq!(found(&snapshot, "n1"), ok("1 2", "1"));
    assert_eq!(found(&snapshot, "n3"), ok("4", "4"));
    assert_eq!(found(&snapshot, "n4"), ok("1 2 3 4", ""));
    // None on the node: the zone's, before all.
    let snapshot = cluster(", trafficDistribution: PreferSameNode", "{addresses: [10.0.0.3]}, {addresses: [10.0.0.4]}");
    assert_eq!(found(&snapshot, "n1"), ok("3", ""));
    // Where the slice says itself where an endpoint is, that holds.
    let told = "{addresses: [192.168.0.8], nodeName: n2, zone: z2}, {addresses: [192.168.0.9], nodeName: n3}, {addresses: [10.0.0.1]}";
    let snapshot = cluster(", trafficDistribution: PreferSameZone", told);
    assert_eq!(found(&snapshot, "n3"), ok("8 9", ""));
}

#[test]
fn unready_and_ending_endpoints_count_only_where_the_service_publishes_them() {
    let endpoints = "{addresses: [10.0.0.1], conditions: {ready: false}}, {addresses: [10.0.0.3], conditions: {ready: true, terminating: true}}, {addresses: [10.0.0.4]}";
    assert_eq!(found(&cluster("", endpoints), "n1"), ok("4", ""));
    assert_eq!(found(&cluster(", publishNotReadyAddresses: true", endpoints), "n1"), ok("1 3 4", "1"));
    assert_eq!(
        found(&cluster("", "{addresses: [10.0.0.1], conditions: {ready: false}}"), "n1"),
        Err(Unavailable::NoneReady)
    );
}

#[test]
fn candidates_are_of_the_family_asked_for_unless_there_are_only_others_and_those_are_not_the_kernels() {
    let snapshot = cluster("", &four(""));
    let service = &snapshot.services["shop/web"];
    let six = "fd96::1".parse().unwrap();
    let all = candidates(&snapshot, "n1", service, 80, six).unwrap();
    assert!(all.len() == 4 && all.iter().all(|one| one.address.is_ipv4()));
    assert_eq!(on_lane(&all, "n1", six).count(), 0);
}
