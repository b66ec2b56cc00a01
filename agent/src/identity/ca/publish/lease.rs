//! The Lease of the replica that publishes: held by renewing it, taken over when its holder renews it no more.
//!
//! Other machines' clocks are not believed: a Lease is free when it was seen not to change for its whole length.

use std::time::Instant;

use k8s_openapi::{
    api::coordination::v1::{Lease as Object, LeaseSpec},
    apimachinery::pkg::apis::meta::v1::{MicroTime, ObjectMeta},
    jiff::Timestamp,
};
use kube::{Api, Client, api::PostParams};

use crate::{
    identity::{
        ca::{root::random_serial, secret::within},
        roots::hex,
    },
    life::limits,
};

/// Its name, in the CA's namespace.
pub(super) const NAME: &str = "heddle-ca-publisher";

/// What to do about a Lease.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Turn {
    Create,
    Renew,
    TakeOver,
    Wait,
}

/// Pure: who may hold it, by what it says and since when it was seen to say so.
fn decide(found: Option<&LeaseSpec>, me: &str, unchanged: std::time::Duration) -> Turn {
    let Some(spec) = found else { return Turn::Create };
    match spec.holder_identity.as_deref() {
        Some(holder) if holder == me => Turn::Renew,
        None | Some("") => Turn::TakeOver,
        Some(_) if unchanged >= limits::LEASE => Turn::TakeOver,
        Some(_) => Turn::Wait,
    }
}

pub(super) struct Lease {
    api: Api<Object>,
    me: String,
    /// Version last seen, and since when.
    seen: Option<(String, Instant)>,
    /// Ours until then, by our own clock, without another renewal.
    held: Option<Instant>,
    renewed: Option<Instant>,
    failing: bool,
}

impl Lease {
    pub fn new(client: Client, namespace: &str) -> Self {
        // Without random numbers nothing else of the CA works either; the process id tells replicas of one machine apart.
        let random = random_serial().map(|serial| hex(&serial[..4])).unwrap_or_default();
        // A pod's is its name. For people only.
        let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
        let me = format!("{}_{}_{random}", host.trim(), std::process::id());
        Self { api: Api::namespaced(client, namespace), me, seen: None, held: None, renewed: None, failing: false }
    }

    /// Renews or takes it where that is due and may be. Whether it is ours.
    pub async fn hold(&mut self) -> bool {
        let now = Instant::now();
        let due = self.renewed.is_none_or(|at| now.duration_since(at) >= limits::LEASE_RENEW);
        if due {
            let turn = self.turn(now).await;
            if let Err(error) = &turn
                && !self.failing
            {
                tracing::warn!(lease = NAME, %error, "Lease can't be renewed; trying again.");
            }
            self.failing = turn.is_err();
        }
        self.held.is_some_and(|until| Instant::now() < until)
    }

    async fn turn(&mut self, now: Instant) -> Result<(), kube::Error> {
        let found = within(self.api.get_opt(NAME)).await?;
        let version = found.as_ref().and_then(|lease| lease.metadata.resource_version.clone()).unwrap_or_default();
        let since = match &self.seen {
            Some((seen, since)) if *seen == version => *since,
            _ => now,
        };
        self.seen = Some((version, since));
        let spec = found.as_ref().and_then(|lease| lease.spec.as_ref());
        // Of a Lease without a spec nobody is the holder.
        let spec = found.as_ref().map(|_| spec.cloned().unwrap_or_default());
        let turn = decide(spec.as_ref(), &self.me, now.duration_since(since));
        let written = match (turn, found) {
            (Turn::Wait, _) => {
                self.held = None;
                return Ok(());
            }
            (Turn::Create, _) | (_, None) => {
                let metadata = ObjectMeta { name: Some(NAME.to_owned()), ..ObjectMeta::default() };
                let lease = Object { metadata, spec: Some(self.spec(None)) };
                within(self.api.create(&PostParams::default(), &lease)).await
            }
            (Turn::Renew | Turn::TakeOver, Some(mut lease)) => {
                lease.spec = Some(self.spec(spec.as_ref()));
                within(self.api.replace(NAME, &PostParams::default(), &lease)).await
            }
        };
        match written {
            Ok(_) => {
                if turn != Turn::Renew {
                    tracing::info!(lease = NAME, holder = self.me, "Publishing: the Lease is ours.");
                }
                self.renewed = Some(now);
                self.held = Some(now + limits::LEASE);
                Ok(())
            }
            // Another replica was faster.
            Err(kube::Error::Api(status)) if status.is_conflict() || status.is_already_exists() => {
                self.held = None;
                Ok(())
            }
            Err(error) => Err(error),
        }
    }

    fn spec(&self, before: Option<&LeaseSpec>) -> LeaseSpec {
        let now = MicroTime(Timestamp::now());
        let ours = before.and_then(|spec| spec.holder_identity.as_deref()) == Some(&self.me);
        let transitions = before.map(|spec| spec.lease_transitions.unwrap_or_default());
        LeaseSpec {
            holder_identity: Some(self.me.clone()),
            lease_duration_seconds: i32::try_from(limits::LEASE.as_secs()).ok(),
            acquire_time: before.filter(|_| ours).and_then(|spec| spec.acquire_time.clone()).or(Some(now.clone())),
            renew_time: Some(now),
            lease_transitions: Some(transitions.map_or(0, |count| count + i32::from(!ours))),
            ..LeaseSpec::default()
        }
    }

    /// Gives it back at the end, so that the next replica need not wait.
    pub async fn release(&mut self) {
        if self.held.take().is_none() {
            return;
        }
        let released = async {
            let Some(mut lease) = within(self.api.get_opt(NAME)).await? else { return Ok(()) };
            let spec = lease.spec.get_or_insert_default();
            if spec.holder_identity.as_deref() != Some(&self.me) {
                return Ok(());
            }
            spec.holder_identity = None;
            within(self.api.replace(NAME, &PostParams::default(), &lease)).await.map(drop)
        };
        if let Err(error) = released.await {
            tracing::info!(lease = NAME, %error, "Lease not given back; it ends by itself.");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_lease_is_taken_only_from_nobody_or_from_who_is_silent() {
        let of =
            |holder: Option<&str>| LeaseSpec { holder_identity: holder.map(str::to_owned), ..LeaseSpec::default() };
        let almost = limits::LEASE - Duration::from_millis(1);
        assert_eq!(decide(None, "a", Duration::ZERO), Turn::Create);
        assert_eq!(decide(Some(&of(None)), "a", Duration::ZERO), Turn::TakeOver);
        assert_eq!(decide(Some(&of(Some(""))), "a", Duration::ZERO), Turn::TakeOver);
        assert_eq!(decide(Some(&of(Some("a"))), "a", limits::LEASE), Turn::Renew);
        assert_eq!(decide(Some(&of(Some("b"))), "a", almost), Turn::Wait);
        assert_eq!(decide(Some(&of(Some("b"))), "a", limits::LEASE), Turn::TakeOver);
    }
}
