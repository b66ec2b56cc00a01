//! Does the way from one pod's link lead to the other's, and nowhere else?

use std::{io, net::IpAddr, pin::pin};

use futures::TryStreamExt;
use rtnetlink::packet_route::{
    AddressFamily,
    route::{RouteAddress, RouteAttribute, RouteMessage, RouteType},
};

use super::{
    super::route::{Link, to_io},
    LaneFault, VethDevice, unknown,
};

/// Where the kernel would send a packet.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Way {
    kind: RouteType,
    exit: Option<u32>,
    /// Another router than the destination itself.
    gateway: bool,
}

/// An address and the device that it is behind.
type At<'a> = (IpAddr, &'a VethDevice);

/// Asks the kernel, in the netns of `from` and then in the agent's, for the way of a packet to `to`.
pub async fn check(pod: &Link, home: &Link, from: At<'_>, to: At<'_>) -> Result<(), LaneFault> {
    let ask = |error: io::Error| match error.raw_os_error() {
        Some(_) => LaneFault::Route(format!("{} to {}: {error}", from.0, to.0)),
        None => unknown("netlink")(error),
    };
    let leaves = way(pod, from.0, to.0, None).await.map_err(ask)?;
    if leaves.kind != RouteType::Unicast || leaves.exit != Some(from.1.index) {
        return Err(astray("in the pod", from.0, to.0, &leaves));
    }
    // On one bridge, and without a router: switched, and the node's routes are not asked.
    if !leaves.gateway && from.1.bridge.is_some() && from.1.bridge == to.1.bridge {
        return Ok(());
    }
    let entry = from.1.bridge.unwrap_or(from.1.host);
    let forwarded = way(home, from.0, to.0, Some(entry)).await.map_err(ask)?;
    if forwarded.kind == RouteType::Unicast && arrives(&forwarded, to.1) {
        return Ok(());
    }
    Err(astray("on the node", from.0, to.0, &forwarded))
}

/// To the pod's link, at the end of which is the pod alone; or to its bridge, on which another router would lead elsewhere.
fn arrives(way: &Way, to: &VethDevice) -> bool {
    match to.bridge {
        Some(bridge) => way.exit == Some(bridge) && !way.gateway,
        None => way.exit == Some(to.host),
    }
}

fn astray(place: &str, from: IpAddr, to: IpAddr, way: &Way) -> LaneFault {
    let exit = way.exit.map_or("to no device".into(), |index| format!("to device {index}"));
    let gateway = if way.gateway { " by way of a router" } else { "" };
    LaneFault::Route(format!("{from} to {to}: the route {place} ({:?}) leads {exit}{gateway}", way.kind))
}

async fn way(link: &Link, from: IpAddr, to: IpAddr, entry: Option<u32>) -> io::Result<Way> {
    let mut query = RouteMessage::default();
    let (family, bits) = if to.is_ipv4() { (AddressFamily::Inet, 32) } else { (AddressFamily::Inet6, 128) };
    query.header.address_family = family;
    query.header.destination_prefix_length = bits;
    query.header.source_prefix_length = bits;
    query.attributes.push(RouteAttribute::Destination(RouteAddress::from(to)));
    query.attributes.push(RouteAttribute::Source(RouteAddress::from(from)));
    query.attributes.extend(entry.map(RouteAttribute::Iif));
    let mut answer = pin!(link.handle.route().get(query).execute());
    let route = answer.try_next().await.map_err(to_io)?.ok_or(io::ErrorKind::InvalidData)?;
    let mut way = Way { kind: route.header.kind, exit: None, gateway: false };
    for attribute in route.attributes {
        match attribute {
            RouteAttribute::Oif(index) => way.exit = Some(index),
            RouteAttribute::Gateway(gateway) => way.gateway = gateway != RouteAddress::from(to),
            RouteAttribute::Via(_) | RouteAttribute::Encap(_) => way.gateway = true,
            _ => {}
        }
    }
    Ok(way)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_way_arrives_at_the_pods_link_or_at_its_bridge_without_another_router() {
        let link = VethDevice { index: 2, host: 7, host_name: "veth1".into(), bridge: None };
        let port = VethDevice { bridge: Some(3), ..link.clone() };
        let way = |exit, gateway| Way { kind: RouteType::Unicast, exit: Some(exit), gateway };
        assert!(arrives(&way(7, false), &link) && arrives(&way(7, true), &link));
        assert!(!arrives(&way(3, false), &link));
        assert!(arrives(&way(3, false), &port));
        assert!(!arrives(&way(3, true), &port));
        assert!(!arrives(&way(7, false), &port), "a port has no routes");
    }
}
