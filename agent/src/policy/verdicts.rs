//! What the kernel may remember of two pods and a port: one answer that holds for every connection between them. Pure.
//!
//! The kernel looks up pods, not addresses, so an answer that depends on which of their addresses are used is none. Nor is one
//! that comes from not knowing: the agent gives that itself, for as long as it doesn't know.

use std::{net::IpAddr, sync::Arc};

use super::{Denial, Request, Rulebook, decide};
use crate::{cluster::Workload, identity::SpiffeId};

/// What [`decide`] answers for every connection of a pair.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    Allow,
    /// The denial is the same for all of them.
    Deny(Denial),
    /// The kernel may not answer.
    Unsaid,
}

/// Two pods, as connections between them show them.
#[derive(Debug, Clone, Copy)]
pub struct Ends<'a> {
    pub principal: &'a SpiffeId,
    /// Every address that the source may connect from.
    pub from: &'a [IpAddr],
    pub destination: &'a Arc<Workload>,
    /// Every address that the destination may be reached at.
    pub to: &'a [IpAddr],
}

/// What the kernel may remember: the decision for every pair of addresses of one family, where that is one decision.
#[must_use]
pub fn verdict(rules: &Rulebook, ends: &Ends<'_>, port: u16) -> Verdict {
    let mut all = None;
    for (source_ip, destination_ip) in ends.from.iter().flat_map(|from| ends.to.iter().map(move |to| (*from, *to))) {
        if source_ip.is_ipv4() != destination_ip.is_ipv4() {
            continue;
        }
        let request = Request {
            principal: Some(ends.principal.clone()),
            source_ip,
            destination: Arc::clone(ends.destination),
            destination_ip,
            destination_port: port,
        };
        let one = match decide(rules, &request) {
            Ok(_) => Verdict::Allow,
            Err(Denial::Incomplete { .. } | Denial::UnknownWorkload { .. }) => Verdict::Unsaid,
            Err(denial) => Verdict::Deny(denial),
        };
        match &all {
            None => all = Some(one),
            Some(before) if *before == one => {}
            Some(_) => return Verdict::Unsaid,
        }
    }
    all.unwrap_or(Verdict::Unsaid)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        cluster::PolicyGap,
        policy::tests::{CLIENT, authorization, cluster, rules, workload},
    };

    const FOUR: [&str; 2] = ["10.0.1.1", "10.0.0.9"];
    const SIX: [&str; 2] = ["fd00::1", "fd00::9"];

    fn asked(rules: &Rulebook, from: &[&str], to: &[&str], port: u16) -> Verdict {
        let parse = |texts: &[&str]| texts.iter().map(|text| text.parse().unwrap()).collect::<Vec<IpAddr>>();
        let (from, to) = (parse(from), parse(to));
        let destination = workload("shop", "web");
        let principal = CLIENT.parse().unwrap();
        verdict(rules, &Ends { principal: &principal, from: &from, destination: &destination, to: &to }, port)
    }

    fn both(rules: &Rulebook, port: u16) -> Verdict {
        asked(rules, &[FOUR[0], SIX[0]], &[FOUR[1], SIX[1]], port)
    }

    fn denied_by(policy: &str) -> Verdict {
        Verdict::Deny(Denial::Explicit { policy: policy.into() })
    }

    #[test]
    fn it_is_what_the_engine_decides_for_the_source_and_the_port() {
        assert_eq!(both(&rules(&[]), 80), Verdict::Allow);
        let spec = "{rules: [{from: [{source: {principals: [cluster.local/ns/shop/sa/client]}}], to: [{operation: {ports: ['80']}}]}]}";
        let allow = rules(&[authorization("shop/allow", spec)]);
        assert_eq!(both(&allow, 80), Verdict::Allow);
        assert_eq!(both(&allow, 81), Verdict::Deny(Denial::NotAllowed));
        let deny = rules(&[authorization("shop/deny", "{action: DENY, rules: [{}]}")]);
        assert_eq!(both(&deny, 80), denied_by("shop/deny"));
    }

    #[test]
    fn families_that_are_decided_differently_leave_nothing_to_remember() {
        let spec = "{action: DENY, rules: [{from: [{source: {ipBlocks: [fd00::/16]}}]}]}";
        let six_denied = rules(&[authorization("shop/six", spec)]);
        assert_eq!(both(&six_denied, 80), Verdict::Unsaid);
        assert_eq!(asked(&six_denied, &FOUR[..1], &FOUR[1..], 80), Verdict::Allow);
        assert_eq!(asked(&six_denied, &SIX[..1], &SIX[1..], 80), denied_by("shop/six"));
        // Denied both ways, but not by the same policy: which one is counted would depend on the family.
        let four = "{action: DENY, rules: [{from: [{source: {ipBlocks: [10.0.0.0/8]}}]}]}";
        let twice = rules(&[authorization("shop/six", spec), authorization("shop/four", four)]);
        assert_eq!(both(&twice, 80), Verdict::Unsaid);
    }

    #[test]
    fn two_addresses_of_one_family_count_as_families_do() {
        let spec = "{action: DENY, rules: [{when: [{key: destination.ip, values: [10.0.0.9]}]}]}";
        let one_denied = rules(&[authorization("shop/one", spec)]);
        assert_eq!(asked(&one_denied, &FOUR[..1], &["10.0.0.9", "10.0.0.10"], 80), Verdict::Unsaid);
        assert_eq!(asked(&one_denied, &FOUR[..1], &["10.0.0.10"], 80), Verdict::Allow);
    }

    #[test]
    fn what_is_not_known_is_not_remembered() {
        assert_eq!(asked(&rules(&[]), &FOUR[..1], &SIX[1..], 80), Verdict::Unsaid, "no family in common");
        assert_eq!(asked(&rules(&[]), &[], &FOUR[1..], 80), Verdict::Unsaid, "no address");
        assert_eq!(both(&Rulebook::default(), 80), Verdict::Unsaid, "the rulebook does not know the pod");
        let gap = |policies: &[_]| {
            let mut snapshot = cluster(policies, &[]);
            snapshot.policy_gaps = vec![Arc::new(PolicyGap { source: "file".into(), namespace: None })];
            Rulebook::compile(&snapshot)
        };
        assert_eq!(both(&gap(&[]), 80), Verdict::Unsaid, "policies may be missing");
        let deny = [authorization("shop/deny", "{action: DENY, rules: [{}]}")];
        assert_eq!(both(&gap(&deny), 80), denied_by("shop/deny"), "whatever may be missing");
    }
}
