//! What of heddle's is on this node, whoever left it: asked of the kernel, never of what was noted. It changes nothing.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs, io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

use aya::{maps::loaded_maps, programs::loaded_programs};
use heddle_common::{MARK, ROUTE_TABLE, RULE_PREFERENCE, maps, programs};
use rtnetlink::{
    IpVersion, RouteMessageBuilder,
    packet_route::{
        route::{RouteAttribute, RouteMessage},
        rule::{RuleAttribute, RuleMessage},
    },
};

use super::{
    caller,
    netns::{Home, Netns},
    own_routes, probe,
    route::{Link, listed},
};
use crate::causes;

const PROGRAMS: [&str; 11] = [
    programs::CONNECT4,
    programs::CONNECT6,
    programs::LOOKUP,
    programs::SENDMSG4,
    programs::SENDMSG6,
    programs::PEERNAME4,
    programs::PEERNAME6,
    programs::OBSERVE,
    programs::KUBELET,
    programs::KUBELET4,
    programs::KUBELET6,
];
/// Names that nobody else gives a map.
const MAPS: [&str; 10] = [
    maps::DESTINATIONS,
    maps::ATTESTED,
    maps::LISTENERS,
    maps::RESIDENTS,
    maps::VERDICTS,
    maps::DENIALS,
    maps::LOOKED,
    maps::ADMITTED,
    maps::PROBE_PORTS,
    maps::PROBING,
];
/// Where runtimes keep network namespaces without a process.
const NAMED: &str = "/run/netns";

/// Names that others may give a map too: they tell only beside the name of a program.
const COMMON_MAPS: [&str; 5] = [maps::GATES, maps::COUNTS, maps::SERVICES, maps::ASKED, maps::EVENTS];

/// One thing that is left.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, serde::Serialize)]
pub struct Left {
    /// `program`, `map`, `pin`, `rule`, `route` or `cgroup`.
    pub kind: &'static str,
    pub what: String,
}

impl Left {
    #[must_use]
    pub fn new(kind: &'static str, what: impl Into<String>) -> Self {
        Self { kind, what: what.into() }
    }
}

/// Everything of heddle's in the kernel of this node.
///
/// # Errors
/// What can't be looked at: then nothing is proven.
pub async fn in_kernel(bpffs: &Path, cgroups: Option<&Path>) -> io::Result<Vec<Left>> {
    let mut left = BTreeSet::new();
    left.extend(loaded()?);
    left.extend(pins(bpffs)?);
    left.extend(in_pods().await?);
    if let Some(root) = cgroups {
        folders(root, &mut left)?;
    }
    Ok(left.into_iter().collect())
}

/// Programs and maps that are loaded, pinned or not.
fn loaded() -> io::Result<Vec<Left>> {
    let (mut ours, mut common) = (BTreeMap::new(), BTreeSet::new());
    for map in loaded_maps() {
        let map = match map {
            Ok(map) => map,
            Err(error) if gone(&error) => continue,
            Err(error) => return Err(io::Error::other(error)),
        };
        let name = map.name_as_str().unwrap_or_default().to_owned();
        if MAPS.contains(&name.as_str()) {
            ours.insert(map.id(), name);
        } else if COMMON_MAPS.contains(&name.as_str()) {
            common.insert(map.id());
        }
    }
    let mut left: Vec<Left> = ours.iter().map(|(id, name)| Left::new("map", format!("{name} (id {id})"))).collect();
    for program in loaded_programs() {
        let program = match program {
            Ok(program) => program,
            Err(error) if gone(&error) => continue,
            Err(error) => return Err(io::Error::other(error)),
        };
        let name = program.name_as_str().unwrap_or_default().to_owned();
        // The names are common words: what makes a program heddle's is a map of heddle's.
        let known = |id: &u32| ours.contains_key(id) || common.contains(id);
        let uses = || program.map_ids().ok().flatten().is_some_and(|maps| maps.iter().any(known));
        if PROGRAMS.contains(&name.as_str()) && uses() {
            left.push(Left::new("program", format!("{name} (id {})", program.id())));
        }
    }
    Ok(left)
}

/// Whether it went while the list was read.
fn gone(error: &(dyn std::error::Error + 'static)) -> bool {
    let mut causes = causes::chain(error).filter_map(|cause| cause.downcast_ref::<io::Error>());
    causes.any(|error| error.kind() == io::ErrorKind::NotFound)
}

fn pins(folder: &Path) -> io::Result<Vec<Left>> {
    match fs::read_dir(folder) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(error) => Err(named(folder, &error)),
        Ok(entries) => {
            let mut left = vec![Left::new("pin", folder.display().to_string())];
            for entry in entries {
                left.push(Left::new("pin", entry?.path().display().to_string()));
            }
            Ok(left)
        }
    }
}

/// Rules and routes in every network namespace of the node but this one.
async fn in_pods() -> io::Result<Vec<Left>> {
    let home = Home::here()?;
    let mut left = Vec::new();
    for path in namespaces()? {
        // One whose last process ended meanwhile is gone; this process' own is none of a pod's.
        let Ok(netns) = Netns::open(&path, &home) else { continue };
        let link = Link::open(&netns)?;
        for (version, family) in [(IpVersion::V4, "IPv4"), (IpVersion::V6, "IPv6")] {
            let rules: Vec<RuleMessage> = listed(link.handle.rule().get(version).execute()).await?;
            if rules.iter().any(ours) {
                let what = format!("{} {family} to table {ROUTE_TABLE:#x}", path.display());
                left.push(Left::new("rule", what));
            }
        }
        let asked = [
            RouteMessageBuilder::<std::net::Ipv4Addr>::new().table_id(ROUTE_TABLE).build(),
            RouteMessageBuilder::<std::net::Ipv6Addr>::new().table_id(ROUTE_TABLE).build(),
        ];
        for message in asked {
            let family = message.header.address_family;
            let routes: Vec<RouteMessage> = listed(link.handle.route().get(message).execute()).await?;
            let count = routes.iter().filter(|route| is_ours(route)).count();
            if count > 0 {
                left.push(Left::new("route", format!("{} {count} {family:?} of heddle's", path.display())));
            }
        }
    }
    Ok(left)
}

fn ours(rule: &RuleMessage) -> bool {
    let has = |wanted: RuleAttribute| rule.attributes.contains(&wanted);
    has(RuleAttribute::Priority(RULE_PREFERENCE))
        && (has(RuleAttribute::Table(ROUTE_TABLE)) || has(RuleAttribute::FwMark(MARK)))
}

fn is_ours(route: &RouteMessage) -> bool {
    route.attributes.contains(&RouteAttribute::Table(ROUTE_TABLE)) || own_routes::is_copy(route)
}

/// One path for each network namespace: a process' or a name's.
fn namespaces() -> io::Result<Vec<PathBuf>> {
    let mut found = BTreeMap::new();
    let mut add = |path: PathBuf| {
        if let Ok(metadata) = fs::metadata(&path) {
            found.entry(metadata.ino()).or_insert(path);
        }
    };
    if let Ok(entries) = fs::read_dir(NAMED) {
        entries.flatten().for_each(|entry| add(entry.path()));
    }
    for entry in fs::read_dir("/proc").map_err(|error| named(Path::new("/proc"), &error))? {
        let path = entry?.path();
        if path.file_name().and_then(|name| name.to_str()).is_some_and(|name| name.parse::<u32>().is_ok()) {
            add(path.join("ns/net"));
        }
    }
    Ok(found.into_values().collect())
}

/// Cgroups that probes were started in, below pods'.
fn folders(folder: &Path, left: &mut BTreeSet<Left>) -> io::Result<()> {
    let entries = match fs::read_dir(folder) {
        // It went meanwhile.
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        other => other.map_err(|error| named(folder, &error))?,
    };
    for entry in entries.flatten() {
        let Ok(kind) = entry.file_type() else { continue };
        if !kind.is_dir() {
            continue;
        }
        let path = entry.path();
        let name = entry.file_name();
        if [probe::CGROUP, caller::CGROUP].iter().any(|own| name == *own) {
            left.insert(Left::new("cgroup", path.display().to_string()));
        }
        folders(&path, left)?;
    }
    Ok(())
}

fn named(path: &Path, error: &io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("{}: {error}", path.display()))
}
