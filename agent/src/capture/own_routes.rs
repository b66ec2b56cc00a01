//! Keeps a pod's own addresses reachable while the first rule comes into its netns.
//!
//! Until then the kernel keeps the table `local` inside the table `main` and asks that one alone. The first rule parts them
//! (`fib_unmerge`, net/ipv4/fib_frontend.c), and for some microseconds `main` has lost the pod's own addresses while nobody asks
//! `local` yet: a packet that comes in then is thrown away. A reset that is lost is never sent again, and its client waits for
//! ever. So `main` has them as routes of its own for that time. IPv4 only: IPv6 never keeps the two in one.

use std::{io, net::Ipv4Addr};

use rtnetlink::{
    IpVersion, RouteMessageBuilder,
    packet_route::{
        route::{RouteAttribute, RouteHeader, RouteMessage, RouteProtocol, RouteType},
        rule::RuleAttribute,
    },
};

use super::route::{Link, ignore, listed};
use crate::life::limits;

/// Who made the copies (`rtm_protocol`): nobody else uses this number.
const COPY: RouteProtocol = RouteProtocol::Other(0x68);

/// What netlink says of a copy that is there already, and of a device that has gone, or down, since it was listed.
const GONE_OR_THERE: [i32; 3] = [libc::EEXIST, libc::ENODEV, libc::ENETDOWN];

/// Whether a route is such a copy.
pub fn is_copy(route: &RouteMessage) -> bool {
    route.header.protocol == COPY && in_table(route, libc::RT_TABLE_MAIN)
}

/// Copies the routes to the pod's own addresses, unless the netns has a rule of `preference` already.
pub async fn lend(link: &Link, preference: u32) -> io::Result<()> {
    let rules = listed(link.handle.rule().get(IpVersion::V4).execute()).await?;
    if rules.iter().any(|rule| rule.attributes.contains(&RuleAttribute::Priority(preference))) {
        return Ok(());
    }
    let own = routes(link)
        .await?
        .into_iter()
        .filter(|route| route.header.kind == RouteType::Local && in_table(route, libc::RT_TABLE_LOCAL));
    for route in own.take(limits::OWN_ROUTES) {
        ignore(&GONE_OR_THERE, link.handle.route().add(copy(route)).execute().await)?;
    }
    Ok(())
}

/// Takes all copies away, also those that an agent left which died meanwhile.
pub async fn take_back(link: &Link) -> io::Result<()> {
    for route in routes(link).await?.into_iter().filter(is_copy) {
        ignore(&[libc::ESRCH], link.handle.route().del(copy(route)).execute().await)?;
    }
    Ok(())
}

async fn routes(link: &Link) -> io::Result<Vec<RouteMessage>> {
    let all = RouteMessageBuilder::<Ipv4Addr>::new().build();
    listed(link.handle.route().get(all).execute()).await
}

fn in_table(route: &RouteMessage, table: u8) -> bool {
    route.attributes.contains(&RouteAttribute::Table(table.into()))
}

fn copy(mut route: RouteMessage) -> RouteMessage {
    route.header.table = RouteHeader::RT_TABLE_MAIN;
    route.header.protocol = COPY;
    route.attributes.retain(|part| {
        matches!(part, RouteAttribute::Destination(_) | RouteAttribute::Oif(_) | RouteAttribute::PrefSource(_))
    });
    route
}
