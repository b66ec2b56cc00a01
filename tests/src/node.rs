//! A node: a network namespace with a bridge that its pods hang on, and a link to the other node.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use anyhow::Result;

use crate::netns::Netns;

/// The device between the nodes: where packets are recorded.
pub const LINK: &str = "link0";

/// A node of the lab, numbered from 1.
#[derive(Debug)]
pub struct Node {
    pub number: u8,
    pub netns: Netns,
}

impl Node {
    /// Makes the namespace, the bridge and forwarding. [`Node::join`] makes the link.
    pub fn create(prefix: &str, number: u8) -> Result<Self> {
        let node = Self { number, netns: Netns::create(&format!("{prefix}-node{number}"))? };
        node.netns.sysctl(&[("net/ipv4/ip_forward", "1"), ("net/ipv6/conf/all/forwarding", "1")])?;
        node.netns.batch(&[
            // An address of its own, as CNIs give it: else it takes the lowest of its ports', and with each pod that comes or
            // goes the others may have to ask for their router's again.
            format!("link add pods address 02:68:65:64:00:{number:02x} type bridge stp_state 0 forward_delay 0"),
            format!("addr add {}/24 dev pods", node.gateway_v4()),
            format!("addr add {}/64 dev pods nodad", node.gateway_v6()),
            "link set pods up".to_owned(),
        ])?;
        Ok(node)
    }

    /// Joins two nodes by a veth pair, with routes to each other's pods.
    pub fn join(&self, other: &Self) -> Result<()> {
        self.netns.batch(&[format!("link add {LINK} type veth peer name {LINK} netns {}", other.netns.name())])?;
        for (near, far) in [(self, other), (other, self)] {
            near.netns.batch(&[
                format!("addr add {}/24 dev {LINK}", near.v4()),
                format!("addr add {}/64 dev {LINK} nodad", near.v6()),
                format!("link set {LINK} up"),
                format!("route add 10.244.{}.0/24 via {}", far.number, far.v4()),
            ])?;
            // After the device is up, else the route is refused.
            near.netns.batch(&[format!("route add fd00:244:{}::/64 via {}", far.number, far.v6())])?;
        }
        Ok(())
    }

    /// `metadata.name` of its Node object.
    #[must_use]
    pub fn name(&self) -> String {
        format!("node{}", self.number)
    }

    /// Its address on the link.
    #[must_use]
    pub fn v4(&self) -> Ipv4Addr {
        Ipv4Addr::new(192, 168, 244, self.number)
    }

    #[must_use]
    pub fn v6(&self) -> Ipv6Addr {
        Ipv6Addr::new(0xfd00, 0x244, 0xffff, 0, 0, 0, 0, self.number.into())
    }

    /// Its address on the bridge: the default route of its pods.
    #[must_use]
    pub fn gateway_v4(&self) -> Ipv4Addr {
        Ipv4Addr::new(10, 244, self.number, 1)
    }

    #[must_use]
    pub fn gateway_v6(&self) -> Ipv6Addr {
        Ipv6Addr::new(0xfd00, 0x244, self.number.into(), 0, 0, 0, 0, 1)
    }

    /// Addresses of its `slot`th pod.
    #[must_use]
    pub fn pod_addresses(&self, slot: u8) -> (Ipv4Addr, Ipv6Addr) {
        let host = slot + 9;
        (
            Ipv4Addr::new(10, 244, self.number, host),
            Ipv6Addr::new(0xfd00, 0x244, self.number.into(), 0, 0, 0, 0, host.into()),
        )
    }

    #[must_use]
    pub fn addresses(&self) -> [IpAddr; 2] {
        [self.v4().into(), self.v6().into()]
    }
}
