//! Is the pod's only way to others one link to this node?

use std::{
    collections::BTreeSet,
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    os::fd::{AsFd, AsRawFd},
    pin::pin,
};

use futures::TryStreamExt;
use rtnetlink::{
    RouteMessageBuilder,
    packet_core::{NLM_F_REQUEST, NetlinkMessage, NetlinkPayload},
    packet_route::{
        RouteNetlinkMessage,
        address::AddressAttribute,
        link::{InfoKind, LinkAttribute, LinkInfo, LinkMessage},
        nsid::{NsidAttribute, NsidMessage},
        route::{RouteAttribute, RouteHeader, RouteMessage, RouteType},
    },
};

use super::{
    super::{
        netns::Netns,
        route::{LOOPBACK, Link, to_io},
    },
    LaneFault, unknown,
};

/// A pod's link to this node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VethDevice {
    /// Its index in the pod's netns.
    pub index: u32,
    /// Index and name of its other end, in the agent's netns.
    pub host: u32,
    pub host_name: String,
    /// Index of the bridge that the other end is a port of, if it is one.
    pub bridge: Option<u32>,
}

/// What netlink says of a device, as far as it is looked at.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Found {
    index: u32,
    name: String,
    kind: Option<InfoKind>,
    /// Index of the other end, and the id of its netns as the device's netns has it.
    peer: Option<u32>,
    peer_netns: Option<i32>,
    controller: Option<u32>,
}

impl Found {
    fn kind(&self) -> String {
        match &self.kind {
            Some(kind) => kind.to_string(),
            None => "a device of no kind".into(),
        }
    }
}

impl From<LinkMessage> for Found {
    fn from(message: LinkMessage) -> Self {
        let mut found = Self { index: message.header.index, ..Self::default() };
        for attribute in message.attributes {
            match attribute {
                LinkAttribute::IfName(name) => found.name = name,
                LinkAttribute::Link(peer) => found.peer = Some(peer),
                LinkAttribute::LinkNetNsId(id) => found.peer_netns = Some(id),
                LinkAttribute::Controller(index) => found.controller = Some(index),
                LinkAttribute::LinkInfo(infos) => {
                    found.kind = infos.into_iter().find_map(|info| match info {
                        LinkInfo::Kind(kind) => Some(kind),
                        _ => None,
                    });
                }
                _ => {}
            }
        }
        found
    }
}

/// The one device that carries the pod's addresses and its default routes, if its other end is in the agent's netns.
pub async fn device(netns: &Netns, addresses: &[IpAddr]) -> Result<VethDevice, LaneFault> {
    let netlink = || unknown("netlink");
    let pod = Link::open(netns).map_err(netlink())?;
    let home = Link::home().map_err(netlink())?;
    let mut indices = carriers(&pod, addresses).await.map_err(netlink())?;
    for v6 in [false, true] {
        if addresses.iter().any(|address| address.is_ipv6() == v6) {
            indices.extend(defaults(&pod, v6).await.map_err(netlink())?);
        }
    }
    indices.remove(&LOOPBACK);
    let mut devices = Vec::new();
    for index in indices {
        devices.push(find(&pod, index).await.map_err(netlink())?);
    }
    let own = single(devices)?;
    let peer = own
        .peer
        .filter(|_| own.kind == Some(InfoKind::Veth))
        .ok_or_else(|| LaneFault::Device(format!("{} of the pod is {}, no veth", own.name, own.kind())))?;
    let away =
        || LaneFault::Device(format!("the other end of the pod's {} is not on this node's own network", own.name));
    // Indices are alike in all pods: the netns must be the agent's too.
    let id = id_of(&pod, netns.home()).await.map_err(netlink())?;
    if own.peer_netns.is_none_or(|netns| Some(netns) != id) {
        return Err(away());
    }
    let host = find(&home, peer).await.map_err(|_| away())?;
    if host.kind != Some(InfoKind::Veth) || host.peer != Some(own.index) {
        return Err(away());
    }
    let bridge = match host.controller {
        None => None,
        Some(index) => {
            let controller = find(&home, index).await.map_err(netlink())?;
            if controller.kind != Some(InfoKind::Bridge) {
                let what = format!("{} is behind {}, which is {}", host.name, controller.name, controller.kind());
                return Err(LaneFault::Device(what));
            }
            Some(index)
        }
    };
    Ok(VethDevice { index: own.index, host: host.index, host_name: host.name, bridge })
}

fn single(devices: Vec<Found>) -> Result<Found, LaneFault> {
    let names: Vec<String> = devices.iter().map(|device| format!("{} ({})", device.name, device.kind())).collect();
    let mut devices = devices.into_iter();
    match (devices.next(), devices.next()) {
        (Some(only), None) => Ok(only),
        (None, _) => Err(LaneFault::Device("no device of the pod carries its addresses".into())),
        _ => Err(LaneFault::Device(format!("the pod is reached over several devices: {}", names.join(", ")))),
    }
}

async fn find(link: &Link, index: u32) -> io::Result<Found> {
    let mut answer = pin!(link.handle.link().get().match_index(index).execute());
    let message = answer.try_next().await.map_err(to_io)?;
    message.map(Found::from).ok_or_else(|| io::ErrorKind::NotFound.into())
}

/// The devices that have the addresses.
async fn carriers(link: &Link, addresses: &[IpAddr]) -> io::Result<BTreeSet<u32>> {
    let mut indices = BTreeSet::new();
    let mut all = pin!(link.handle.address().get().execute());
    while let Some(message) = all.try_next().await.map_err(to_io)? {
        // Of a point-to-point device, `Address` is the other side's; IPv6 has no `Local` then.
        let own = message.attributes.iter().find_map(|attribute| match attribute {
            AddressAttribute::Local(address) => Some(*address),
            _ => None,
        });
        let own = own.or_else(|| {
            message.attributes.iter().find_map(|attribute| match attribute {
                AddressAttribute::Address(address) => Some(*address),
                _ => None,
            })
        });
        if own.is_some_and(|own| addresses.contains(&own)) {
            indices.insert(message.header.index);
        }
    }
    Ok(indices)
}

/// The devices of the main table's default routes.
async fn defaults(link: &Link, v6: bool) -> io::Result<BTreeSet<u32>> {
    let query = if v6 {
        RouteMessageBuilder::<Ipv6Addr>::new().build()
    } else {
        RouteMessageBuilder::<Ipv4Addr>::new().build()
    };
    let mut indices = BTreeSet::new();
    let mut all = pin!(link.handle.route().get(query).execute());
    while let Some(route) = all.try_next().await.map_err(to_io)? {
        let header = &route.header;
        if header.destination_prefix_length == 0
            && header.table == RouteHeader::RT_TABLE_MAIN
            && header.kind == RouteType::Unicast
        {
            indices.extend(exits(&route));
        }
    }
    Ok(indices)
}

fn exits(route: &RouteMessage) -> Vec<u32> {
    let exits = route.attributes.iter().flat_map(|attribute| match attribute {
        RouteAttribute::Oif(index) => vec![*index],
        RouteAttribute::MultiPath(hops) => hops.iter().map(|hop| hop.interface_index).collect(),
        _ => Vec::new(),
    });
    exits.collect()
}

/// The id of a netns in that of the link, where it has one.
async fn id_of(link: &Link, netns: impl AsFd) -> io::Result<Option<i32>> {
    use futures::StreamExt;
    let descriptor = u32::try_from(netns.as_fd().as_raw_fd()).map_err(io::Error::other)?;
    let mut query = NsidMessage::default();
    query.attributes.push(NsidAttribute::Fd(descriptor));
    let mut request = NetlinkMessage::from(RouteNetlinkMessage::GetNsId(query));
    request.header.flags = NLM_F_REQUEST;
    let mut answers = pin!(link.handle.clone().request(request).map_err(to_io)?);
    match answers.next().await.map(|message| message.payload) {
        Some(NetlinkPayload::InnerMessage(RouteNetlinkMessage::NewNsId(answer))) => {
            Ok(answer.attributes.iter().find_map(|attribute| match attribute {
                NsidAttribute::Id(id) if *id >= 0 => Some(*id),
                _ => None,
            }))
        }
        Some(NetlinkPayload::Error(error)) => Err(error.to_io()),
        _ => Err(io::ErrorKind::InvalidData.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pod_on_the_lane_has_one_device() {
        let veth = |name: &str| Found { name: name.into(), kind: Some(InfoKind::Veth), ..Found::default() };
        assert_eq!(single(vec![veth("eth0")]), Ok(veth("eth0")));
        assert_eq!(single(Vec::new()).unwrap_err().reason(), "device");
        let several = single(vec![veth("eth0"), veth("net1")]).unwrap_err();
        assert_eq!(several.to_string(), "device: the pod is reached over several devices: eth0 (veth), net1 (veth)");
    }
}
