//! How much one node gets.

use std::time::{Duration, Instant, SystemTime};

use super::{HOUR, named, plain_csr, request};
use crate::{
    identity::{
        SpiffeId,
        ca::{
            ServiceAccount,
            admission::Admission,
            authorize::{Authorized, Caller, Phase, Pod, Rules, bound, here},
            issue::{Examined, examine},
            review::Review,
        },
    },
    life::limits,
};

fn pod(namespace: &str, name: &str, account: &str, node: &str) -> Pod {
    Pod {
        namespace: namespace.into(),
        name: name.into(),
        uid: format!("uid of {name}").into(),
        account: account.into(),
        node: node.into(),
        phase: Phase::Running,
        ends: None,
    }
}

fn caller(node: &str) -> Caller {
    let agents = vec![ServiceAccount { namespace: "heddle-system".to_owned(), name: "heddle".to_owned() }];
    let own = pod("heddle-system", &format!("agent of {node}"), "heddle", node);
    let review = Review {
        authenticated: true,
        audiences: vec!["istio-ca".to_owned()],
        username: "system:serviceaccount:heddle-system:heddle".to_owned(),
        groups: vec!["system:serviceaccounts".to_owned(), "system:serviceaccounts:heddle-system".to_owned()],
        pod_names: vec![own.name.to_string()],
        pod_uids: vec![own.uid.to_string()],
        ..Review::default()
    };
    let rules = Rules { audience: "istio-ca".to_owned(), agents };
    bound(&rules, &review).unwrap().stand(Some(&own), SystemTime::now()).unwrap()
}

fn authorized(node: &str, account: usize) -> Authorized {
    let identity: SpiffeId = format!("spiffe://mesh.test/ns/shop/sa/app-{account}").parse().unwrap();
    let own = pod("shop", "app", identity.service_account(), node);
    here(&caller(node), &identity, [&own], SystemTime::now()).unwrap()
}

fn asked(node: &str, account: usize, csr: &str) -> Examined {
    let authorized = authorized(node, account);
    let request = request(csr.to_owned(), named(authorized.identity().as_str()), 60);
    examine(&request, authorized, HOUR).unwrap()
}

#[test]
fn a_node_gets_so_many_new_identities_a_minute_and_renewals_beside() {
    let (admission, start) = (Admission::new(HOUR), Instant::now());
    let burst = limits::CA_NEW_IDENTITIES.burst as usize;
    // Each caller and identity has a CSR of its own; the node's first is the same key again, and that is fine.
    let csrs: Vec<String> = (0..burst + 70).map(|_| plain_csr()).collect();
    let admit = |node: &str, account: usize, now: Instant| {
        admission.admit(asked(node, account, &csrs[account]), now).map(drop).map_err(|refusal| refusal.reason())
    };
    for account in 0..burst {
        assert_eq!(admit("node-1", account, start), Ok(()), "{account}");
    }
    assert_eq!(admit("node-1", burst, start), Err("too_many_new_identities"));
    for account in 0..burst {
        assert_eq!(admit("node-1", account, start), Ok(()), "renewal of {account}");
    }
    let minute = start + Duration::from_secs(60);
    let more = (burst..burst + 70).filter(|account| admit("node-1", *account, minute).is_ok()).count();
    assert_eq!(more, 60, "a minute later");
    // What it had longer ago than a certificate lasts is new again.
    let admission = Admission::new(Duration::from_secs(60));
    let admit = |account: usize, now: Instant| admission.admit(asked("node-1", account, &csrs[account]), now).is_ok();
    assert!((0..burst).all(|account| admit(account, start)));
    let granted = (0..burst).filter(|account| admit(*account, start + Duration::from_secs(100))).count();
    assert_eq!(granted, 100);
}

#[test]
fn nodes_do_not_take_from_each_other() {
    let (admission, now) = (Admission::new(HOUR), Instant::now());
    let burst = limits::CA_NEW_IDENTITIES.burst as usize;
    let granted = |node: &str| {
        (0..burst + 5).filter(|account| admission.admit(asked(node, *account, &plain_csr()), now).is_ok()).count()
    };
    assert_eq!((granted("node-1"), granted("node-2")), (burst, burst));
}

#[test]
fn a_node_that_asks_without_end_is_slowed_down() {
    let (admission, now) = (Admission::new(HOUR), Instant::now());
    let csr = plain_csr();
    let burst = limits::CA_CERTIFICATES_PER_NODE.burst;
    let answers: Vec<_> = (0..burst + 3)
        .map(|_| admission.admit(asked("node-1", 0, &csr), now).map_err(|refusal| refusal.reason()))
        .collect();
    assert_eq!(answers.iter().filter(|answer| answer.is_ok()).count(), burst as usize);
    assert!(answers.iter().all(|answer| answer.is_ok() || matches!(answer, Err("too_many_certificates"))));
}

#[test]
fn a_key_is_signed_for_one_caller_and_one_identity_within_a_lifetime() {
    let (admission, now) = (Admission::new(HOUR), Instant::now());
    let csr = plain_csr();
    let admit = |node: &str, account: usize, now: Instant| {
        admission.admit(asked(node, account, &csr), now).map(drop).map_err(|refusal| refusal.reason())
    };
    assert_eq!(admit("node-1", 1, now), Ok(()));
    assert_eq!(admit("node-1", 1, now), Ok(()), "an answer that was lost is asked for again");
    assert_eq!(admit("node-2", 1, now), Err("csr_replayed"));
    assert_eq!(admit("node-1", 2, now), Err("csr_replayed"));
    assert_eq!(admit("node-1", 1, now + HOUR / 2), Ok(()), "which extends it");
    assert_eq!(admit("node-2", 1, now + HOUR), Err("csr_replayed"));
    assert_eq!(admit("node-2", 1, now + HOUR * 2), Ok(()), "no certificate of it is left");
}

#[test]
fn questions_about_pods_have_a_rate() {
    let (admission, now) = (Admission::new(HOUR), Instant::now());
    let asks = (0..1_000).filter(|_| admission.question(&"node-1".into(), now).is_ok()).count();
    assert_eq!(asks, limits::CA_QUESTIONS_PER_NODE.burst as usize);
    assert!(admission.question(&"node-2".into(), now).is_ok());
}
