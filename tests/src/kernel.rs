//! The kernel's tables of a node, read and written past its agent: what the kernel lane holds, and what its programs cost.

use std::{
    collections::BTreeMap,
    net::IpAddr,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use aya::{
    maps::{HashMap, Map, MapData, MapError, PerCpuArray},
    programs::{ProgramInfo, links::PinnedLink, loaded_programs},
};
use heddle_common::{
    Address, Attestation, LAYOUT_VERSION, Pair, PodCounts, Resident, Tuple, Verdict, attested_by, maps, verdict,
};

use crate::{agent::Agent, lab::Lab, pod::Pod, wait::until};

/// Slot that no pod of a lab gets: entries that a test makes up are nobody's.
const NOBODY: u32 = heddle_common::MAX_PODS - 1;

/// The pinned tables of one node.
#[derive(Debug)]
pub struct Kernel {
    folder: PathBuf,
}

/// How often a program ran, and for how long in all.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Cost {
    pub runs: u64,
    pub time: Duration,
}

/// Entries that fill a table to its last place; they go with this value.
#[derive(Debug)]
pub struct Stuffing<K: aya::Pod, V: aya::Pod> {
    table: HashMap<MapData, K, V>,
    keys: Vec<K>,
}

impl Agent {
    /// The tables that it shares with the kernel; they are there without it, too.
    #[must_use]
    pub fn kernel(&self) -> Kernel {
        Kernel { folder: self.bpffs.join(format!("v{LAYOUT_VERSION}")) }
    }
}

/// An address as the tables have it.
#[must_use]
pub fn address(address: IpAddr) -> Address {
    match address.to_canonical() {
        IpAddr::V4(address) => Address::v4(address.octets()),
        IpAddr::V6(address) => Address::v6(address.octets()),
    }
}

impl Kernel {
    fn table<T: TryFrom<Map, Error = MapError>>(&self, name: &str) -> Result<T> {
        let path = self.folder.join("maps").join(name);
        let data = MapData::from_pin(&path).with_context(|| path.display().to_string())?;
        Ok(Map::from_map_data(data).and_then(T::try_from)?)
    }

    fn entries<K: aya::Pod, V: aya::Pod>(&self, name: &str) -> Result<Vec<(K, V)>> {
        let table: HashMap<MapData, K, V> = self.table(name)?;
        // An entry that goes while the table is walked is not there.
        Ok(table.iter().filter_map(Result::ok).collect())
    }

    /// Workload id and slot of a pod of this node.
    pub fn resident(&self, pod: &Pod) -> Result<Option<Resident>> {
        let table: HashMap<MapData, Address, Resident> = self.table(maps::RESIDENTS)?;
        found(table.get(&address(pod.v4().into()), 0))
    }

    fn known(&self, pod: &Pod) -> Result<Resident> {
        self.resident(pod)?.with_context(|| format!("{} is no resident", pod.full_name()))
    }

    /// What the programs of a pod counted, summed over the CPUs.
    pub fn counts(&self, pod: &Pod) -> Result<PodCounts> {
        let table: PerCpuArray<MapData, PodCounts> = self.table(maps::COUNTS)?;
        let values = table.get(&self.known(pod)?.slot, 0)?;
        Ok(values.iter().fold(PodCounts::default(), |sum, one| PodCounts {
            marked: sum.marked + one.marked,
            captured: sum.captured + one.captured,
            attested: sum.attested + one.attested,
            lane: sum.lane + one.lane,
            lane_denied: sum.lane_denied + one.lane_denied,
            lane_missed: sum.lane_missed + one.lane_missed,
            lane_full: sum.lane_full + one.lane_full,
            events_lost: sum.events_lost + one.events_lost,
            ..sum
        }))
    }

    /// What the kernel remembers of a pair of pods and a port.
    pub fn verdict(&self, from: &Pod, to: &Pod, port: u16) -> Result<Option<u32>> {
        let (Some(from), Some(to)) = (self.resident(from)?, self.resident(to)?) else { return Ok(None) };
        let table: HashMap<MapData, Pair, Verdict> = self.table(maps::VERDICTS)?;
        let seen = found(table.get(&Pair::new(from.workload, to.workload, port), 0))?;
        Ok(seen.map(|verdict| verdict.action))
    }

    pub fn verdicts(&self) -> Result<Vec<(Pair, Verdict)>> {
        self.entries(maps::VERDICTS)
    }

    /// Connections that the kernel itself attests.
    pub fn lanes(&self) -> Result<Vec<(Tuple, Attestation)>> {
        let mut entries: Vec<(Tuple, Attestation)> = self.entries(maps::ATTESTED)?;
        entries.retain(|(_, attestation)| attestation.by == attested_by::KERNEL);
        Ok(entries)
    }

    /// All attested connections, also those that the agent delivers.
    pub fn attested(&self) -> Result<usize> {
        Ok(self.entries::<Tuple, Attestation>(maps::ATTESTED)?.len())
    }

    /// Fills the table of attested connections with ones that don't exist.
    pub fn fill_attested(&self) -> Result<Stuffing<Tuple, Attestation>> {
        let nobody = Address::v4([192, 0, 2, 1]);
        Stuffing::new(self.table(maps::ATTESTED)?, |number| {
            let [_, _, high, low] = number.to_be_bytes();
            let [_, second, ..] = number.to_be_bytes();
            let destination = Address::v4([198, 18, 0, second]);
            let source_port = u16::from_be_bytes([high, low]);
            let tuple = Tuple { source: nobody, destination, source_port, destination_port: 1, padding: 0 };
            (tuple, Attestation::by_agent(NOBODY))
        })
    }

    /// Fills the table of verdicts with permits for pods that don't exist.
    pub fn fill_verdicts(&self) -> Result<Stuffing<Pair, Verdict>> {
        Stuffing::new(self.table(maps::VERDICTS)?, |number| {
            (Pair::new(u64::from(number) + 1, 1, 1), Verdict { action: verdict::ALLOW, counter: 0 })
        })
    }

    /// What each program of a pod cost so far, by its name. It counts only while [`measure`] is held.
    pub fn costs(&self, pod: &Pod) -> Result<BTreeMap<String, Cost>> {
        let folder = self.folder.join("pods").join(pod.uid());
        let mut programs = BTreeMap::new();
        for entry in std::fs::read_dir(&folder).with_context(|| folder.display().to_string())?.flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            // The record is a symbolic link, not one of the kernel's.
            if entry.file_type()?.is_file() {
                let link = aya::programs::links::FdLink::from(PinnedLink::from_pin(entry.path())?);
                programs.insert(link.info()?.program_id(), name);
            }
        }
        let seen = loaded_programs().filter_map(Result::ok).filter_map(|program: ProgramInfo| {
            let cost = Cost { runs: program.run_count(), time: program.run_time() };
            Some((programs.get(&program.id())?.clone(), cost))
        });
        Ok(seen.collect())
    }
}

/// How many programs hang on a cgroup itself.
pub fn programs_on(cgroup: &Path) -> Result<usize> {
    let output = std::process::Command::new("bpftool").args(["-j", "cgroup", "show"]).arg(cgroup).output()?;
    ensure!(output.status.success(), "bpftool: {output:?}");
    // Of none it says nothing.
    let text = String::from_utf8_lossy(&output.stdout);
    let text = if text.trim().is_empty() { "[]" } else { text.trim() };
    let listed: Vec<serde_json::Value> = serde_json::from_str(text).context("bpftool's answer")?;
    Ok(listed.len())
}

/// The kernel counts runs and time of every program as long as the answer is held (`BPF_ENABLE_STATS`).
pub fn measure() -> Result<std::os::fd::OwnedFd> {
    aya::sys::enable_stats(aya::sys::Stats::RunTime).context("run time statistics of programs")
}

fn found<T>(looked_up: std::result::Result<T, MapError>) -> Result<Option<T>> {
    match looked_up {
        Ok(value) => Ok(Some(value)),
        Err(MapError::KeyNotFound) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

impl<K: aya::Pod, V: aya::Pod> Stuffing<K, V> {
    /// More than any table of the lane holds.
    const MOST: u32 = 1 << 20;

    fn new(mut table: HashMap<MapData, K, V>, entry: impl Fn(u32) -> (K, V)) -> Result<Self> {
        let mut keys = Vec::new();
        for number in 0..Self::MOST {
            let (key, value) = entry(number);
            if table.insert(key, value, 0).is_err() {
                break;
            }
            keys.push(key);
        }
        ensure!(keys.len() < Self::MOST as usize, "a table without a last place");
        Ok(Self { table, keys })
    }

    #[must_use]
    pub fn len(&self) -> usize {
        self.keys.len()
    }

    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.keys.is_empty()
    }
}

impl<K: aya::Pod, V: aya::Pod> Drop for Stuffing<K, V> {
    fn drop(&mut self) {
        for key in &self.keys {
            // One that the agent swept is gone already.
            let _ = self.table.remove(key);
        }
    }
}

impl Lab {
    /// Connects until the kernel remembers what policy says of the pair and the port; gives one of `heddle_common::verdict`.
    pub fn learn(&self, client: &Pod, server: &Pod, port: u16) -> Result<u32> {
        let kernel = self.agent(client.node())?.kernel();
        let what = format!("a verdict for {} to {}:{port}", client.full_name(), server.full_name());
        until(Duration::from_secs(15), &what, || {
            // Every kind of server ends a connection whose client has ended it.
            client.connect(server.at(port)).say("1\n").flag("--half-close").with("--patience", 2_000).run().ok()?;
            kernel.verdict(client, server, port).ok().flatten()
        })
        .with_context(|| {
            let unproven =
                self.agent(client.node()).and_then(Agent::status).map(|status| status["unproven_paths"].clone());
            format!("{:?}, {unproven:?}", kernel.counts(client))
        })
    }

    /// The same, where policy lets the pair talk: what follows takes the kernel lane.
    pub fn take_the_lane(&self, client: &Pod, server: &Pod, port: u16) -> Result<()> {
        let learned = self.learn(client, server, port)?;
        ensure!(learned == verdict::ALLOW, "{} to {}:{port} is denied", client.full_name(), server.full_name());
        Ok(())
    }
}
