//! Fuzzing of what we say of ourselves in a CONNECT, which is made of what manifests say: see [`crate::fuzzing`].

use std::sync::LazyLock;

use super::request::baggage;
use crate::cluster::{self, Snapshot, Workload};

const POD: &str = "
apiVersion: v1
kind: Pod
metadata: {name: web, namespace: shop, uid: web}
spec: {containers: []}
status: {phase: Running, podIP: 10.0.0.1}
";

/// Whatever the names are, the baggage is a header with the members that were meant and no more (W3C Baggage §3.3).
pub fn own_headers(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    static READ: LazyLock<Snapshot> = LazyLock::new(|| cluster::fuzzing::snapshot(POD));
    let snapshot = &*READ;
    let Some(pod) = snapshot.workloads.get("web") else { unreachable!("the cluster has the pod") };
    let mut workload = Workload::clone(pod);
    workload.naming.workload = text.into();
    workload.naming.canonical_name = text.into();
    let Some(header) = baggage(text, &workload) else { unreachable!("no header for {text:?}") };
    let Ok(header) = header.to_str() else { unreachable!("{header:?} is not ASCII") };
    let values = header.split(',').filter_map(|member| member.split_once('='));
    for (key, value) in values {
        if key != "k8s.namespace.name" && key != "service.version" {
            assert_eq!(decoded(value).as_deref(), Some(text.as_bytes()), "{key} of {header}");
        }
    }
    assert!(header.bytes().all(|byte| matches!(byte, b'!' | b'#'..=b'~')), "{header}");
}

/// Percent-decoding, apart from the code that encodes.
fn decoded(value: &str) -> Option<Vec<u8>> {
    let mut bytes = value.bytes();
    let mut out = Vec::new();
    while let Some(byte) = bytes.next() {
        let digit = |byte: Option<u8>| char::from(byte?).to_digit(16);
        out.push(match byte {
            b'%' => u8::try_from(digit(bytes.next())? * 16 + digit(bytes.next())?).ok()?,
            other => other,
        });
    }
    Some(out)
}
