use std::{net::IpAddr, path::Path, sync::Arc, time::Instant};

use super::{Indexer, Settings, index};
use crate::cluster::{
    Distribution, Objects, Place, Places, SameNode, Snapshot, Unattended, Warning, Workload, read::read,
};

fn snapshot(text: &str) -> Snapshot {
    let manifest = read(text);
    assert_eq!(manifest.errors, [], "{text}");
    index(&[Arc::new(manifest.objects)], &Settings::default(), 1)
}

fn address(text: &str) -> IpAddr {
    text.parse().unwrap()
}

/// A pod `web` in `shop` with an address.
fn pod(metadata: &str, spec: &str) -> String {
    format!(
        "---\napiVersion: v1\nkind: Pod\nmetadata: {{name: web, namespace: shop{metadata}}}\nspec: {{containers: []{spec}}}\n\
         status: {{phase: Running, podIP: 10.0.0.1, podIPs: [{{ip: 10.0.0.1}}, {{ip: 'fd00::1'}}]}}\n"
    )
}

fn namespace(labels: &str) -> String {
    format!("---\napiVersion: v1\nkind: Namespace\nmetadata: {{name: shop, labels: {{{labels}}}}}\n")
}

fn only(snapshot: &Snapshot) -> Arc<Workload> {
    assert_eq!(snapshot.workloads.len(), 1);
    Arc::clone(snapshot.workloads.values().next().unwrap())
}

#[test]
fn enrolment_is_a_wish_that_every_no_overrules() {
    const ON: &str = "heddle.dev/mesh: enabled";
    const OFF: &str = "heddle.dev/mesh: disabled";
    const NONE: &str = "istio.io/dataplane-mode: none";
    let labels = |labels: &str| format!(", labels: {{{labels}}}");
    let table = [
        ("", String::new(), "", false),
        (ON, String::new(), "", true),
        (OFF, String::new(), "", false),
        ("", labels(ON), "", true),
        (ON, labels(ON), "", true),
        (ON, labels(OFF), "", false),
        // Disabled wins on either.
        (OFF, labels(ON), "", false),
        (ON, labels(NONE), "", false),
        ("", labels(&format!("{ON}, {NONE}")), "", false),
        (&format!("{ON}, {NONE}"), labels(ON), "", false),
        // Istio's own opt-in is not ours.
        ("istio.io/dataplane-mode: ambient", String::new(), "", false),
        (ON, labels("istio.io/dataplane-mode: ambient"), "", true),
        // What is said badly is not said.
        (ON, labels("heddle.dev/mesh: 'true'"), "", true),
        ("heddle.dev/mesh: 'yes'", String::new(), "", false),
        (ON, String::new(), ", hostNetwork: true", false),
        (ON, labels(ON), ", hostNetwork: true", false),
        (ON, ", annotations: {sidecar.istio.io/status: '{}'}".into(), "", false),
        (ON, format!(", labels: {{{ON}}}, annotations: {{sidecar.istio.io/status: ''}}"), "", false),
    ];
    for (of_namespace, metadata, spec, expected) in table {
        let snapshot = snapshot(&(namespace(of_namespace) + &pod(&metadata, spec)));
        assert_eq!(only(&snapshot).enrolled, expected, "namespace {of_namespace:?}, pod {metadata:?} {spec:?}");
        let destinations: Vec<_> = snapshot.mesh_destinations().collect();
        assert_eq!(!destinations.is_empty(), expected);
    }
}

#[test]
fn namespace_that_nobody_described_enrols_nothing_but_pods_may_enrol_themselves() {
    assert!(!only(&snapshot(&pod("", ""))).enrolled);
    assert!(only(&snapshot(&pod(", labels: {heddle.dev/mesh: enabled}", ""))).enrolled);
}

#[test]
fn unclear_labels_and_annotations_are_warned_of() {
    let text = namespace("heddle.dev/mesh: 'yes'")
        + &pod(", labels: {heddle.dev/mesh: 'on'}, annotations: {heddle.dev/when-unattended: opne}", "");
    let snapshot = snapshot(&text);
    let objects: Vec<_> = snapshot.warnings.iter().map(|warning| (warning.object.as_str(), warning.field)).collect();
    let expected = [
        ("Namespace shop", "metadata.labels"),
        ("Pod shop/web", "metadata.labels"),
        ("Pod shop/web", "metadata.annotations"),
    ];
    assert_eq!(objects, expected);
    assert_eq!(only(&snapshot).when_unattended, Unattended::Closed);
}

#[test]
fn unattended_pods_are_closed_unless_annotated_open() {
    let annotated = |value: &str| {
        only(&snapshot(&pod(&format!(", annotations: {{heddle.dev/when-unattended: {value}}}"), ""))).when_unattended
    };
    assert_eq!(annotated("open"), Unattended::Open);
    assert_eq!(annotated("closed"), Unattended::Closed);
    assert_eq!(only(&snapshot(&pod("", ""))).when_unattended, Unattended::Closed);
}

#[test]
fn same_node_is_said_by_the_pod_else_by_its_namespace_and_an_unclear_word_means_mutual_tls() {
    let says = |value: &str| match value {
        "" => String::new(),
        value => format!(", annotations: {{heddle.dev/same-node: {value}}}"),
    };
    let table = [
        ("", "", SameNode::Kernel, vec![]),
        ("", "kernel", SameNode::Kernel, vec![]),
        ("", "mtls", SameNode::Mtls, vec![]),
        ("mtls", "", SameNode::Mtls, vec![]),
        ("mtls", "kernel", SameNode::Kernel, vec![]),
        ("kernel", "mtls", SameNode::Mtls, vec![]),
        ("kernel", "", SameNode::Kernel, vec![]),
        ("", "MTLS", SameNode::Mtls, vec!["Pod shop/web"]),
        ("kernel", "'true'", SameNode::Mtls, vec!["Pod shop/web"]),
        ("tls", "", SameNode::Mtls, vec!["Namespace shop"]),
        ("tls", "kernel", SameNode::Kernel, vec!["Namespace shop"]),
        ("tls", "on", SameNode::Mtls, vec!["Namespace shop", "Pod shop/web"]),
    ];
    for (of_namespace, of_pod, expected, warned) in table {
        let namespace =
            format!("---\napiVersion: v1\nkind: Namespace\nmetadata: {{name: shop{}}}\n", says(of_namespace));
        let snapshot = snapshot(&(namespace + &pod(&says(of_pod), "")));
        assert_eq!(only(&snapshot).same_node, expected, "namespace {of_namespace:?}, pod {of_pod:?}");
        let objects: Vec<_> = snapshot.warnings.iter().map(|warning| &*warning.object).collect();
        assert_eq!(objects, warned, "namespace {of_namespace:?}, pod {of_pod:?}");
        let exact = |warning: &Warning| {
            warning.field == "metadata.annotations" && warning.message.ends_with("taken as mtls; write one of the two")
        };
        assert!(snapshot.warnings.iter().all(exact), "{:?}", snapshot.warnings);
    }
}

#[test]
fn pod_record_holds_what_the_manifest_says() {
    let text = "apiVersion: v1\nkind: Pod\nmetadata: {name: web, namespace: shop, uid: u-1, labels: {app: web}, \
                annotations: {lab.heddle.dev/netns: /var/run/netns/x, lab.heddle.dev/cgroup: /sys/fs/cgroup/x}}\n\
                spec: {containers: [], nodeName: node-1, serviceAccountName: cashier}\n\
                status: {podIPs: [{ip: '::ffff:10.0.0.1'}], podIP: 10.0.0.1, conditions: [{type: Ready, status: 'True'}]}\n";
    let pod = only(&snapshot(text));
    assert_eq!((&*pod.uid, &*pod.name, &*pod.namespace), ("u-1", "web", "shop"));
    assert_eq!((&*pod.service_account, &*pod.node), ("cashier", "node-1"));
    assert_eq!(pod.addresses, [address("10.0.0.1")]);
    assert!(pod.ready && !pod.terminating && !pod.host_network);
    let place = pod.place.clone().unwrap();
    assert_eq!(
        (place.netns.as_path(), place.cgroup.as_path()),
        (Path::new("/var/run/netns/x"), Path::new("/sys/fs/cgroup/x"))
    );
    let bare = only(&snapshot("{apiVersion: v1, kind: Pod, metadata: {name: web}, status: {podIP: 10.0.0.1}}"));
    assert_eq!((&*bare.uid, &*bare.service_account, &*bare.node), ("default/web", "default", ""));
    assert!(!bare.ready && bare.place.is_none());
}

#[test]
fn place_needs_both_paths_absolute() {
    for annotations in ["lab.heddle.dev/netns: /x", "lab.heddle.dev/netns: x, lab.heddle.dev/cgroup: /y"] {
        assert_eq!(only(&snapshot(&pod(&format!(", annotations: {{{annotations}}}"), ""))).place, None);
    }
}

#[test]
fn finished_pods_and_pods_without_an_address_are_left_out() {
    for status in [
        "{phase: Succeeded, podIP: 10.0.0.1}",
        "{phase: Failed, podIP: 10.0.0.1}",
        "{phase: Pending}",
        "{podIP: ''}",
        "{}",
    ] {
        let snapshot = snapshot(&format!("{{apiVersion: v1, kind: Pod, metadata: {{name: web}}, status: {status}}}"));
        assert_eq!((snapshot.workloads.len(), snapshot.by_address.len()), (0, 0), "{status}");
    }
}

#[test]
fn host_network_pods_are_known_but_hold_no_address() {
    let snapshot = snapshot(&pod("", ", hostNetwork: true"));
    assert!(only(&snapshot).host_network);
    assert!(snapshot.by_address.is_empty());
}

#[test]
fn address_of_two_pods_goes_to_the_newer_one_that_is_not_terminating() {
    let one = |name: &str, created: &str, rest: &str| {
        format!(
            "---\napiVersion: v1\nkind: Pod\nmetadata: {{name: {name}, uid: {name}, creationTimestamp: '{created}'{rest}}}\nstatus: {{podIP: 10.0.0.1}}\n"
        )
    };
    let (early, late) = ("2026-01-01T00:00:00Z", "2026-01-02T00:00:00Z");
    let gone = ", deletionTimestamp: '2026-01-03T00:00:00Z'";
    let table = [
        (one("a", early, "") + &one("b", late, ""), "b"),
        (one("a", late, "") + &one("b", early, ""), "a"),
        (one("a", early, "") + &one("b", late, gone), "a"),
        (one("a", late, gone) + &one("b", early, ""), "b"),
        (one("a", early, gone) + &one("b", late, gone), "b"),
    ];
    for (text, expected) in table {
        let snapshot = snapshot(&text);
        assert_eq!(&*snapshot.by_address[&address("10.0.0.1")].name, expected, "{text}");
        assert_eq!(snapshot.warnings.len(), 1);
        assert_eq!(snapshot.workloads.len(), 2);
    }
}

#[test]
fn pods_that_share_a_uid_are_both_known() {
    let one = |name: &str, ip: &str| {
        format!("---\n{{apiVersion: v1, kind: Pod, metadata: {{name: {name}, uid: u}}, status: {{podIP: {ip}}}}}\n")
    };
    let snapshot = snapshot(&(one("a", "10.0.0.1") + &one("b", "10.0.0.2")));
    assert_eq!(&*snapshot.workloads["u"].name, "a");
    assert_eq!(&*snapshot.workloads["default/b"].name, "b");
    assert_eq!((snapshot.by_address.len(), snapshot.warnings.len()), (2, 1));
}

#[test]
fn names_for_telemetry_come_from_labels_and_owner() {
    let owned = |kind: &str, name: &str, labels: &str| {
        let owner =
            format!(", ownerReferences: [{{apiVersion: v1, kind: {kind}, name: {name}, uid: x, controller: true}}]");
        let naming = only(&snapshot(&pod(&format!("{owner}, labels: {{{labels}}}"), ""))).naming.clone();
        (naming.workload.to_string(), naming.workload_kind)
    };
    let table = [
        (("ReplicaSet", "web-5d9f7c8b6d", "pod-template-hash: 5d9f7c8b6d"), ("web", "deployment")),
        (("ReplicaSet", "web-5d9f7c8b6d", ""), ("web", "deployment")),
        (("ReplicaSet", "web-5d9f7c8b6d", "pod-template-hash: other"), ("web-5d9f7c8b6d", "pod")),
        (("ReplicaSet", "handmade", ""), ("handmade", "pod")),
        (("Job", "backup-28391040", ""), ("backup", "cronjob")),
        (("Job", "migrate", ""), ("migrate", "job")),
        (("StatefulSet", "db", ""), ("db", "pod")),
        (("DaemonSet", "log", ""), ("log", "pod")),
        (("StatefulSet", "db", "service.istio.io/workload-name: store"), ("store", "pod")),
    ];
    for ((kind, name, labels), (workload, workload_kind)) in table {
        assert_eq!(owned(kind, name, labels), (workload.to_owned(), workload_kind), "{kind} {name} {labels}");
    }
    let not_controller = ", ownerReferences: [{apiVersion: v1, kind: ReplicaSet, name: x-5d9f7c8b6d, uid: x}]";
    assert_eq!(&*only(&snapshot(&pod(not_controller, ""))).naming.workload, "web");
}

#[test]
fn canonical_names_fall_back_in_istios_order() {
    let all = "service.istio.io/canonical-name: c, app.kubernetes.io/name: n, app: a, \
               service.istio.io/canonical-revision: r, app.kubernetes.io/version: kv, version: v";
    let table = [
        (all, ["c", "r", "a", "v"]),
        ("app.kubernetes.io/name: n, app: a, app.kubernetes.io/version: kv, version: v", ["n", "kv", "a", "v"]),
        ("app: a, version: v", ["a", "v", "a", "v"]),
        ("app.kubernetes.io/name: n, app.kubernetes.io/version: kv", ["n", "kv", "n", "kv"]),
        ("", ["web", "latest", "", ""]),
    ];
    for (labels, expected) in table {
        let naming = only(&snapshot(&pod(&format!(", labels: {{{labels}}}"), ""))).naming.clone();
        assert_eq!(
            [&*naming.canonical_name, &naming.canonical_revision, &naming.app, &naming.version],
            expected,
            "{labels}"
        );
    }
}

const SERVICE: &str = "---\napiVersion: v1\nkind: Service\nmetadata: {name: web, namespace: shop}\n\
    spec: {clusterIP: 10.96.0.1, clusterIPs: [10.96.0.1, 'fd00:96::1'], ports: [{name: http, port: 80, targetPort: web}, {name: dns, port: 53, protocol: UDP}]}\n";

fn slice(name: &str, rest: &str) -> String {
    format!(
        "---\napiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\n\
         metadata: {{name: {name}, namespace: shop, labels: {{kubernetes.io/service-name: web}}}}\n\
         ports: [{{name: http, port: 8080, protocol: TCP}}, {{name: dns, port: 53, protocol: UDP}}]\n{rest}\n"
    )
}

#[test]
fn services_join_with_the_endpoints_of_all_their_slices() {
    let text = SERVICE.to_owned()
        + &slice(
            "v4",
            "addressType: IPv4\nendpoints: [{addresses: [10.0.0.1], nodeName: node-1, zone: z1}, {addresses: [10.0.0.2], conditions: {ready: false}}]",
        )
        + &slice(
            "v6",
            "addressType: IPv6\nendpoints: [{addresses: ['fd00::1'], conditions: {ready: true, terminating: true}}]",
        )
        + &slice("names", "addressType: FQDN\nendpoints: [{addresses: [example.org]}]");
    let snapshot = snapshot(&text);
    let service = &snapshot.services["shop/web"];
    assert_eq!(&*service.hostname, "web.shop.svc.cluster.local");
    let ports: Vec<_> = service.ports.iter().map(|port| (&*port.name, port.port)).collect();
    assert_eq!(ports, [("http", 80)]);
    for cluster_address in ["10.96.0.1", "fd00:96::1"] {
        assert!(Arc::ptr_eq(&snapshot.by_cluster_address[&address(cluster_address)], service));
    }
    let endpoints: Vec<_> =
        service.endpoints.iter().map(|one| (one.address.to_string(), one.ready, one.terminating)).collect();
    let expected = [("10.0.0.1", true, false), ("10.0.0.2", false, false), ("fd00::1", true, true)];
    assert_eq!(endpoints, expected.map(|(address, ready, terminating)| (address.to_owned(), ready, terminating)));
    let ports: Vec<_> = service.endpoints[0].ports.iter().map(|(name, port)| (&**name, *port)).collect();
    assert_eq!(ports, [("http", 8080)]);
    assert_eq!((&*service.endpoints[0].node, &*service.endpoints[0].zone), ("node-1", "z1"));
}

#[test]
fn a_service_says_which_endpoints_it_prefers_and_what_it_says_badly_is_warned_of() {
    let service = |spec: &str| {
        let snapshot = snapshot(&format!(
            "{{apiVersion: v1, kind: Service, metadata: {{name: web, namespace: shop}}, spec: {{{spec}}}}}"
        ));
        let service = &snapshot.services["shop/web"];
        let said = (service.local_only, service.distribution, service.publish_not_ready);
        (said, snapshot.warnings.iter().map(|warning| warning.field).collect::<Vec<_>>())
    };
    let even = (false, Distribution::Even, false);
    let zone = (false, Distribution::SameZone, false);
    assert_eq!(service(""), (even, vec![]));
    assert_eq!(service("internalTrafficPolicy: Cluster, publishNotReadyAddresses: false"), (even, vec![]));
    assert_eq!(service("internalTrafficPolicy: Local"), ((true, Distribution::Even, false), vec![]));
    assert_eq!(service("trafficDistribution: PreferClose"), (zone, vec![]));
    assert_eq!(service("trafficDistribution: PreferSameZone"), (zone, vec![]));
    assert_eq!(service("trafficDistribution: PreferSameNode"), ((false, Distribution::SameNode, false), vec![]));
    assert_eq!(service("publishNotReadyAddresses: true"), ((false, Distribution::Even, true), vec![]));
    assert_eq!(service("internalTrafficPolicy: local"), (even, vec!["spec.internalTrafficPolicy"]));
    assert_eq!(service("trafficDistribution: Nearby"), (even, vec!["spec.trafficDistribution"]));
}

#[test]
fn headless_and_external_services_have_no_cluster_address() {
    let service =
        |spec: &str| snapshot(&format!("{{apiVersion: v1, kind: Service, metadata: {{name: web}}, spec: {spec}}}"));
    for spec in [
        "{clusterIP: None, clusterIPs: [None]}",
        "{type: ExternalName, externalName: example.org, clusterIP: 10.0.0.1}",
        "{clusterIP: ''}",
    ] {
        let snapshot = service(spec);
        assert_eq!((snapshot.services.len(), snapshot.by_cluster_address.len()), (1, 0), "{spec}");
    }
}

#[test]
fn endpoint_learns_from_its_pod_and_node() {
    let terminating = pod(", deletionTimestamp: '2026-01-01T00:00:00Z'", ", nodeName: node-1");
    let node = "---\napiVersion: v1\nkind: Node\nmetadata: {name: node-1, labels: {topology.kubernetes.io/zone: z9}}\n";
    let slice = slice(
        "s",
        "addressType: IPv4\nendpoints: [{addresses: [10.0.0.1], conditions: {ready: true}, targetRef: {kind: Pod, name: web, namespace: shop}}]",
    );
    let snapshot = snapshot(&(terminating + node + SERVICE + &slice));
    let endpoint = &snapshot.services["shop/web"].endpoints[0];
    assert!(endpoint.terminating, "its pod is");
    assert_eq!((&*endpoint.node, &*endpoint.zone), ("node-1", "z9"));
    let locality = &snapshot.localities["node-1"];
    assert_eq!((&*locality.region, &*locality.zone), ("", "z9"));
}

#[test]
fn endpoint_in_two_slices_is_one_with_the_ports_of_both() {
    let other = slice("t", "addressType: IPv4\nendpoints: [{addresses: [10.0.0.1], conditions: {ready: false}}]")
        .replace("http", "metrics")
        .replace("8080", "9090");
    let text = SERVICE.to_owned() + &slice("s", "addressType: IPv4\nendpoints: [{addresses: [10.0.0.1]}]") + &other;
    let snapshot = snapshot(&text);
    let endpoints = &snapshot.services["shop/web"].endpoints;
    assert_eq!((endpoints.len(), endpoints[0].ports.len(), endpoints[0].ready), (1, 2, true));
}

#[test]
fn policies_are_oldest_first_then_by_name() {
    let policy = |name: &str, created: &str| {
        format!(
            "---\napiVersion: security.istio.io/v1\nkind: PeerAuthentication\nmetadata: {{name: {name}, namespace: shop{created}}}\n"
        )
    };
    let text = policy("c", ", creationTimestamp: 2026-01-01T00:00:00Z")
        + &policy("b", ", creationTimestamp: '2026-01-02T00:00:00Z'")
        + &policy("a", ", creationTimestamp: '2026-01-02T00:00:00Z'")
        + &policy("d", "");
    let names: Vec<_> =
        snapshot(&text).peer_authentications.iter().map(|policy| policy.metadata.name.clone().unwrap()).collect();
    assert_eq!(names, ["d", "c", "a", "b"]);
}

#[test]
fn same_objects_give_the_same_content_in_whatever_order() {
    let (a, b) = (namespace("heddle.dev/mesh: enabled"), pod("", ""));
    let (one, other) = (snapshot(&(a.clone() + &b)), snapshot(&(b.clone() + &a)));
    assert!(one.same_content(&other));
    assert!(!one.same_content(&snapshot(&b)));
}

#[test]
fn ten_thousand_pods_are_indexed_in_well_under_a_second() {
    let text: String = (0..10_000_u32)
        .map(|number| {
            let [_, a, b, c] = number.to_be_bytes();
            format!(
                "---\napiVersion: v1\nkind: Pod\nmetadata: {{name: web-{number}, namespace: shop, uid: u-{number}, labels: {{app: web, version: v1}}}}\n\
                 spec: {{containers: [], nodeName: node-1}}\nstatus: {{podIP: 10.{a}.{b}.{c}}}\n"
            )
        })
        .collect();
    let objects = [Arc::new(read(&text).objects)];
    let started = Instant::now();
    let snapshot = index(&objects, &Settings::default(), 1);
    let took = started.elapsed();
    assert_eq!(snapshot.by_address.len(), 10_000);
    println!("indexed 10,000 pods in {took:?}");
    assert!(took.as_millis() < 1_000, "{took:?}");
}

/// Places that a test moves.
#[derive(Debug, Default)]
struct Moving(std::sync::Mutex<std::collections::HashMap<String, Place>>);

impl Places for Moving {
    fn locate(&self, pod: &k8s_openapi::api::core::v1::Pod) -> Option<Place> {
        self.0.lock().unwrap().get(pod.metadata.name.as_deref()?).cloned()
    }
}

#[test]
fn indexing_again_gives_what_indexing_anew_gives() {
    let places = Arc::new(Moving::default());
    let settings = Settings { places: Arc::clone(&places) as Arc<dyn Places>, ..Settings::default() };
    let mut indexer = Indexer::new(settings.clone());
    let mut objects = Objects::default();
    let mut random = fastrand::Rng::with_seed(7);
    let one = |text: &str| read(text).objects;
    for round in 0..600 {
        let name = random.u8(0..6);
        match random.u8(0..8) {
            0..=2 => {
                let (address, label) = (random.u8(1..5), ["enabled", "disabled", "odd"][random.usize(0..3)]);
                let status =
                    if random.bool() { format!(", status: {{podIP: 10.0.0.{address}}}") } else { String::new() };
                let (namespace, uid) = (name % 2, random.u8(0..4));
                let labels = format!("labels: {{heddle.dev/mesh: {label}}}");
                let metadata = format!("{{name: p{name}, namespace: n{namespace}, uid: u{uid}, {labels}}}");
                let text = format!("{{apiVersion: v1, kind: Pod, metadata: {metadata}{status}}}");
                objects.pods.retain(|pod| pod.metadata.name.as_deref() != Some(&*format!("p{name}")));
                objects.pods.extend(one(&text).pods);
            }
            3 => objects.pods.retain(|pod| pod.metadata.name.as_deref() != Some(&*format!("p{name}"))),
            4 | 5 => {
                let label = ["enabled", "disabled", "odd"][random.usize(0..3)];
                objects.namespaces.retain(|found| found.metadata.name.as_deref() != Some(&*format!("n{}", name % 2)));
                let metadata = format!("{{name: n{}, labels: {{heddle.dev/mesh: {label}}}}}", name % 2);
                objects
                    .namespaces
                    .extend(one(&format!("{{apiVersion: v1, kind: Namespace, metadata: {metadata}}}")).namespaces);
            }
            6 => drop(places.0.lock().unwrap().remove(&format!("p{name}"))),
            _ => {
                let addresses = if random.bool() { vec![IpAddr::from([10, 0, 1, name])] } else { Vec::new() };
                let place = Place { netns: format!("/n{}", random.u8(0..2)).into(), addresses, ..Place::default() };
                places.0.lock().unwrap().insert(format!("p{name}"), place);
            }
        }
        let parts = [Arc::new(objects.clone())];
        let (again, anew) = (indexer.index(&parts, 1), index(&parts, &settings, 1));
        assert!(again.same_content(&anew), "round {round}: {again:#?} {anew:#?}");
    }
}

#[test]
fn indexing_again_costs_a_part_of_indexing_anew() {
    let text: String = (0..2_000).map(|number| {
        let labels = format!("labels: {{app: web-{number}, version: v1, app.kubernetes.io/part-of: shop}}");
        format!("---\n{{apiVersion: v1, kind: Pod, metadata: {{name: p{number}, namespace: shop, {labels}}}, status: {{podIP: 10.0.{}.{}}}}}\n", number / 250, number % 250)
    }).collect();
    let parts = [Arc::new(read(&text).objects)];
    let settings = Settings::default();
    let mut indexer = Indexer::new(settings.clone());
    indexer.index(&parts, 1);
    let best = |work: &mut dyn FnMut()| {
        (0..7)
            .map(|_| {
                let began = Instant::now();
                work();
                began.elapsed()
            })
            .min()
            .unwrap()
    };
    let anew = best(&mut || drop(index(&parts, &settings, 1)));
    let again = best(&mut || drop(indexer.index(&parts, 1)));
    println!("2,000 pods: {anew:?} anew, {again:?} again");
    assert!(again * 3 < anew * 2, "{again:?} is no part of {anew:?}");
}
