//! One rule and one route per family in the pod's netns: marked packets go to `lo`.
//!
//! `ip rule add fwmark MARK lookup ROUTE_TABLE pref RULE_PREFERENCE` and `ip route add local default dev lo src <pod address>
//! table ROUTE_TABLE`: so the SYN of a captured connection, and an app's answer to a delivery, find `lo`, where `lookup`
//! decides. Never touches another table or another rule.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    num::NonZeroI32,
};

use heddle_common::{MARK, ROUTE_TABLE, RULE_PREFERENCE};
use rtnetlink::{
    Handle, IpVersion, RouteMessageBuilder,
    packet_route::{
        route::{RouteMessage, RouteProtocol, RouteScope, RouteType},
        rule::{RuleAction, RuleMessage},
    },
};
use tokio::task::JoinHandle;

use super::netns::Netns;

/// Index of `lo` in every netns (`LOOPBACK_IFINDEX`).
const LOOPBACK: u32 = 1;

/// Makes the rules and routes exactly those of `addresses`: each family that has one gets its own, with the first address as
/// the source, and a family without loses what it had.
pub async fn put(netns: &Netns, addresses: &[IpAddr]) -> io::Result<()> {
    let link = Link::open(netns)?;
    let v4 = addresses.iter().find_map(|address| match address {
        IpAddr::V4(address) => Some(*address),
        IpAddr::V6(_) => None,
    });
    let v6 = addresses.iter().find_map(|address| match address {
        IpAddr::V6(address) => Some(*address),
        IpAddr::V4(_) => None,
    });
    match v4 {
        Some(source) => {
            let route = v4_route().pref_source(source).build();
            link.replace_route(route).await?;
            let rule = link.handle.rule().add().v4().fw_mark(MARK).priority(RULE_PREFERENCE).table_id(ROUTE_TABLE);
            ignore(&[libc::EEXIST], rule.action(RuleAction::ToTable).execute().await)?;
        }
        None => link.clear(IpVersion::V4).await?,
    }
    match v6 {
        Some(source) => {
            let route = v6_route().pref_source(source).build();
            link.replace_route(route).await?;
            let rule = link.handle.rule().add().v6().fw_mark(MARK).priority(RULE_PREFERENCE).table_id(ROUTE_TABLE);
            ignore(&[libc::EEXIST], rule.action(RuleAction::ToTable).execute().await)?;
        }
        None => link.clear(IpVersion::V6).await?,
    }
    Ok(())
}

/// Removes them.
pub async fn clear(netns: &Netns) -> io::Result<()> {
    let link = Link::open(netns)?;
    link.clear(IpVersion::V4).await?;
    link.clear(IpVersion::V6).await
}

fn v4_route() -> RouteMessageBuilder<Ipv4Addr> {
    RouteMessageBuilder::<Ipv4Addr>::new()
        .table_id(ROUTE_TABLE)
        .kind(RouteType::Local)
        .scope(RouteScope::Host)
        .protocol(RouteProtocol::Static)
        .output_interface(LOOPBACK)
}

fn v6_route() -> RouteMessageBuilder<Ipv6Addr> {
    RouteMessageBuilder::<Ipv6Addr>::new()
        .table_id(ROUTE_TABLE)
        .kind(RouteType::Local)
        .protocol(RouteProtocol::Static)
        .output_interface(LOOPBACK)
}

/// A netlink socket that was made inside the netns and so speaks of it from wherever it is used.
struct Link {
    handle: Handle,
    connection: JoinHandle<()>,
}

impl Link {
    fn open(netns: &Netns) -> io::Result<Self> {
        let (connection, handle, _) = netns.within(rtnetlink::new_connection)?;
        Ok(Self { handle, connection: tokio::spawn(connection) })
    }

    async fn replace_route(&self, route: RouteMessage) -> io::Result<()> {
        self.handle.route().add(route).replace().execute().await.map_err(to_io)
    }

    /// Removes rule and route of one family; a family that the kernel does not have holds none.
    async fn clear(&self, version: IpVersion) -> io::Result<()> {
        let absent = [libc::ENOENT, libc::ESRCH, libc::EAFNOSUPPORT, libc::EOPNOTSUPP, libc::ENODEV];
        let (rule, route) = match version {
            IpVersion::V4 => {
                let mut add =
                    self.handle.rule().add().v4().fw_mark(MARK).priority(RULE_PREFERENCE).table_id(ROUTE_TABLE);
                add.message_mut().header.action = RuleAction::ToTable;
                (RuleMessage::clone(add.message_mut()), v4_route().build())
            }
            IpVersion::V6 => {
                let mut add =
                    self.handle.rule().add().v6().fw_mark(MARK).priority(RULE_PREFERENCE).table_id(ROUTE_TABLE);
                add.message_mut().header.action = RuleAction::ToTable;
                (RuleMessage::clone(add.message_mut()), v6_route().build())
            }
        };
        ignore(&absent, self.handle.rule().del(rule).execute().await)?;
        ignore(&absent, self.handle.route().del(route).execute().await)
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        self.connection.abort();
    }
}

fn ignore(fine: &[i32], result: Result<(), rtnetlink::Error>) -> io::Result<()> {
    match result.map_err(to_io) {
        Err(error) if error.raw_os_error().is_some_and(|code| code == 0 || fine.contains(&code)) => Ok(()),
        other => other,
    }
}

/// Netlink tells success as an error message without a code.
fn to_io(error: rtnetlink::Error) -> io::Error {
    match error {
        rtnetlink::Error::NetlinkError(message) => {
            io::Error::from_raw_os_error(message.code.map_or(0, NonZeroI32::get).abs())
        }
        other => io::Error::other(other.to_string()),
    }
}
