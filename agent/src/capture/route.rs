//! One rule and two routes per family in the pod's netns: marked packets go to `lo`, or nowhere.
//!
//! `ip rule add fwmark MARK/MARK_MASK lookup ROUTE_TABLE pref RULE_PREFERENCE`, `ip route add local default dev lo src <pod address>
//! table ROUTE_TABLE` and behind it `ip route add unreachable default metric … table ROUTE_TABLE`: so the SYN of a captured
//! connection, and an app's answer to a delivery, find `lo`, where `lookup` decides, and a marked packet never falls through
//! to the main table. Never touches another table or another rule.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    num::NonZeroI32,
};

use futures::{Stream, TryStreamExt};
use heddle_common::{MARK, MARK_MASK, ROUTE_TABLE, RULE_PREFERENCE};
use rtnetlink::{
    Handle, RouteMessageBuilder,
    packet_route::{
        route::{RouteMessage, RouteProtocol, RouteScope, RouteType},
        rule::{RuleAction, RuleAttribute, RuleMessage},
    },
};
use tokio::task::JoinHandle;

use super::{netns::Netns, own_routes};

/// Index of `lo` in every netns (`LOOPBACK_IFINDEX`).
pub const LOOPBACK: u32 = 1;

/// Metric of the IPv6 local route (the kernel's default; the IPv4 one has 0).
const FIRST: u32 = 1_024;
/// Metric of the unreachable routes.
const LAST: u32 = 65_536;

/// What netlink says where a family is not in the kernel.
const NO_FAMILY: [i32; 2] = [libc::EAFNOSUPPORT, libc::EOPNOTSUPP];
/// What it says where there is nothing to remove, with the family or without.
const ABSENT: [i32; 5] = [libc::ENOENT, libc::ESRCH, libc::ENODEV, libc::EAFNOSUPPORT, libc::EOPNOTSUPP];

/// Makes the rules and routes exactly those of `addresses`: a family that has one gets a local route with the first as its
/// source; a family without is left with the unreachable route alone, so that nothing marked leaves over it.
pub async fn put(netns: &Netns, addresses: &[IpAddr]) -> io::Result<()> {
    let link = Link::open(netns)?;
    let mut v4 = None;
    let mut v6 = None;
    for address in addresses {
        match address {
            IpAddr::V4(address) => v4 = v4.or(Some(*address)),
            IpAddr::V6(address) => v6 = v6.or(Some(*address)),
        }
    }
    let local = v4.map(|source| v4_local().pref_source(source).build());
    let put = async {
        own_routes::lend(&link, RULE_PREFERENCE).await?;
        link.put(link.v4_rule(), v4_unreachable(), local, v4_local().build()).await
    };
    let put = put.await;
    let taken_back = own_routes::take_back(&link).await;
    put.and(taken_back)?;
    let local = v6.map(|source| v6_local().pref_source(source).build());
    link.put(link.v6_rule(), v6_unreachable(), local, v6_local().build()).await
}

/// Removes them.
pub async fn clear(netns: &Netns) -> io::Result<()> {
    let link = Link::open(netns)?;
    own_routes::take_back(&link).await?;
    link.clear(link.v4_rule(), [v4_local().build(), v4_unreachable()]).await?;
    link.clear(link.v6_rule(), [v6_local().build(), v6_unreachable()]).await
}

fn v4_local() -> RouteMessageBuilder<Ipv4Addr> {
    let route = RouteMessageBuilder::<Ipv4Addr>::new().table_id(ROUTE_TABLE).protocol(RouteProtocol::Static);
    route.kind(RouteType::Local).scope(RouteScope::Host).output_interface(LOOPBACK)
}

fn v6_local() -> RouteMessageBuilder<Ipv6Addr> {
    let route = RouteMessageBuilder::<Ipv6Addr>::new().table_id(ROUTE_TABLE).protocol(RouteProtocol::Static);
    // The metric tells it from the unreachable route when it is removed: the kernel does not compare IPv6 route types.
    route.kind(RouteType::Local).output_interface(LOOPBACK).priority(FIRST)
}

fn v4_unreachable() -> RouteMessage {
    let route = RouteMessageBuilder::<Ipv4Addr>::new().table_id(ROUTE_TABLE).protocol(RouteProtocol::Static);
    route.kind(RouteType::Unreachable).priority(LAST).build()
}

fn v6_unreachable() -> RouteMessage {
    let route = RouteMessageBuilder::<Ipv6Addr>::new().table_id(ROUTE_TABLE).protocol(RouteProtocol::Static);
    route.kind(RouteType::Unreachable).priority(LAST).build()
}

/// A netlink socket that was made inside the netns and so speaks of it from wherever it is used.
pub struct Link {
    pub handle: Handle,
    connection: JoinHandle<()>,
}

impl Link {
    pub fn open(netns: &Netns) -> io::Result<Self> {
        let (connection, handle, _) = netns.within(rtnetlink::new_connection)?;
        Ok(Self { handle, connection: tokio::spawn(connection) })
    }

    /// Of the agent's own netns.
    pub fn home() -> io::Result<Self> {
        let (connection, handle, _) = rtnetlink::new_connection()?;
        Ok(Self { handle, connection: tokio::spawn(connection) })
    }

    fn v4_rule(&self) -> RuleMessage {
        ruled(self.handle.rule().add().v4().message_mut())
    }

    fn v6_rule(&self) -> RuleMessage {
        ruled(self.handle.rule().add().v6().message_mut())
    }

    /// The routes first, so that the rule never leads to an empty table. The unreachable one is the guard, so it comes before
    /// the local one and stays without it.
    async fn put(
        &self,
        rule: RuleMessage,
        unreachable: RouteMessage,
        local: Option<RouteMessage>,
        former: RouteMessage,
    ) -> io::Result<()> {
        let wanted = local.is_some();
        match self.replace(unreachable).await {
            // Nothing leaves over a family that is not there.
            Err(error) if !wanted && error.raw_os_error().is_some_and(|code| NO_FAMILY.contains(&code)) => {
                return Ok(());
            }
            other => other?,
        }
        match local {
            Some(local) => self.replace(local).await?,
            None => ignore(&ABSENT, self.handle.route().del(former).execute().await)?,
        }
        let mut add = self.handle.rule().add();
        *add.message_mut() = rule;
        ignore(&[libc::EEXIST], add.execute().await)
    }

    async fn replace(&self, route: RouteMessage) -> io::Result<()> {
        ignore(&[], self.handle.route().add(route).replace().execute().await)
    }

    async fn clear(&self, mut rule: RuleMessage, routes: [RouteMessage; 2]) -> io::Result<()> {
        // By preference and table: beside ours there may be that of an agent of layout 2, which had no mask.
        rule.attributes.retain(|part| !matches!(part, RuleAttribute::FwMark(_) | RuleAttribute::FwMask(_)));
        for _ in 0..2 {
            ignore(&ABSENT, self.handle.rule().del(rule.clone()).execute().await)?;
        }
        for route in routes {
            ignore(&ABSENT, self.handle.route().del(route).execute().await)?;
        }
        Ok(())
    }
}

/// The rule, made of one that has its family alone.
fn ruled(message: &mut RuleMessage) -> RuleMessage {
    let mut rule = message.clone();
    rule.header.action = RuleAction::ToTable;
    rule.header.table = 0;
    rule.attributes.push(RuleAttribute::FwMark(MARK));
    rule.attributes.push(RuleAttribute::FwMask(MARK_MASK));
    rule.attributes.push(RuleAttribute::Priority(RULE_PREFERENCE));
    rule.attributes.push(RuleAttribute::Table(ROUTE_TABLE));
    rule
}

impl Drop for Link {
    fn drop(&mut self) {
        self.connection.abort();
    }
}

/// Lets these errors pass.
pub fn ignore(fine: &[i32], result: Result<(), rtnetlink::Error>) -> io::Result<()> {
    match result.map_err(to_io) {
        Err(error) if error.raw_os_error().is_some_and(|code| code == 0 || fine.contains(&code)) => Ok(()),
        other => other,
    }
}

/// What netlink lists; nothing of a family that the kernel does not have.
pub async fn listed<T>(asked: impl Stream<Item = Result<T, rtnetlink::Error>>) -> io::Result<Vec<T>> {
    match asked.try_collect().await.map_err(to_io) {
        Err(error) if error.raw_os_error().is_some_and(|code| NO_FAMILY.contains(&code)) => Ok(Vec::new()),
        other => other,
    }
}

/// Netlink tells success as an error message without a code.
pub fn to_io(error: rtnetlink::Error) -> io::Error {
    match error {
        rtnetlink::Error::NetlinkError(message) => {
            io::Error::from_raw_os_error(message.code.map_or(0, NonZeroI32::get).abs())
        }
        other => io::Error::other(other.to_string()),
    }
}
