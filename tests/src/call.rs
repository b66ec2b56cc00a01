//! One run of `lab-peer` as a client in a pod: its options, its deadline, its typed report.

use std::{fmt::Display, marker::PhantomData, net::IpAddr, path::Path, time::Duration};

use anyhow::{Context, Result};
use serde::de::DeserializeOwned;

use crate::{
    Lab, Netns,
    pod::{Elsewhere, Pod},
    process::Process,
    reports::Held,
};

/// A client that is about to run.
#[must_use = "a call does nothing until it runs"]
#[derive(Debug)]
pub struct Call<'pod, T> {
    pod: &'pod Pod,
    args: Vec<String>,
    deadline: Duration,
    yields: bool,
    elsewhere: Elsewhere,
    report: PhantomData<T>,
}

/// A client that runs.
#[must_use = "a client that is dropped is killed"]
#[derive(Debug)]
pub struct Running<T> {
    process: Process,
    deadline: Duration,
    report: PhantomData<T>,
}

/// Connections that a client holds open.
#[derive(Debug)]
pub struct Holding {
    process: Process,
    deadline: Duration,
}

impl<'pod, T> Call<'pod, T> {
    pub(crate) fn new(pod: &'pod Pod, verb: &str) -> Self {
        Self {
            pod,
            args: vec![verb.to_owned()],
            deadline: Duration::from_secs(30),
            yields: false,
            elsewhere: Elsewhere::default(),
            report: PhantomData,
        }
    }

    /// Any option of `lab-peer` with a value.
    pub fn with(mut self, option: &str, value: impl Display) -> Self {
        self.args.extend([option.to_owned(), value.to_string()]);
        self
    }

    /// Any option of `lab-peer` without one.
    pub fn flag(mut self, option: &str) -> Self {
        self.args.push(option.to_owned());
        self
    }

    /// Bytes that the client sends first.
    pub fn say(self, text: &str) -> Self {
        self.with("--say", text)
    }

    /// An `AF_INET6` socket to `::ffff:a.b.c.d`.
    pub fn v4_mapped(self) -> Self {
        self.flag("--v4-mapped")
    }

    pub fn mptcp(self) -> Self {
        self.flag("--mptcp")
    }

    pub fn fastopen(self) -> Self {
        self.flag("--fastopen")
    }

    /// Binds the socket to this local port first.
    pub fn bind_port(self, port: u16) -> Self {
        self.with("--bind-port", port)
    }

    pub fn bind_device(self, device: &str) -> Self {
        self.with("--bind-device", device)
    }

    /// The app sets a mark of its own (`SO_MARK`).
    pub fn mark(self, mark: u32) -> Self {
        self.with("--mark", mark)
    }

    /// Binds the socket to an address that may be another pod's (`IP_FREEBIND`, `IP_TRANSPARENT`: CAP_NET_ADMIN).
    pub fn bind_address(self, address: impl Into<IpAddr>) -> Self {
        self.with("--bind-address", address.into())
    }

    /// Runs in another network namespace, though in the pod's cgroup.
    pub fn in_netns(mut self, netns: &Netns) -> Self {
        self.elsewhere.netns = Some(netns.path());
        self
    }

    /// Runs as a process of the pod's node: its network namespace, and no pod's cgroup.
    pub fn on_the_host(mut self, lab: &Lab) -> Result<Self> {
        self.elsewhere.netns = Some(lab.node(self.pod.node())?.netns.path());
        let folder = lab.claim().cgroup.join("host");
        crate::cgroup::make(&folder)?;
        self.elsewhere.cgroup = Some(folder);
        Ok(self)
    }

    /// Runs as a process of the pod's node, in this cgroup.
    pub fn on_the_host_in(mut self, lab: &Lab, cgroup: &Path) -> Result<Self> {
        self.elsewhere.netns = Some(lab.node(self.pod.node())?.netns.path());
        self.elsewhere.cgroup = Some(cgroup.to_owned());
        Ok(self)
    }

    /// Takes only the processor time that nobody else wants, as one on another machine would.
    pub fn yielding(mut self) -> Self {
        self.yields = true;
        self
    }

    /// Whole run (seconds).
    pub fn within(mut self, seconds: u64) -> Self {
        self.deadline = Duration::from_secs(seconds);
        self
    }
}

impl<T: DeserializeOwned> Call<'_, T> {
    /// Starts it in the background.
    pub fn start(self) -> Result<Running<T>> {
        let verb = self.args.first().map_or("", String::as_str);
        let process = self.pod.start_lab_peer(&self.elsewhere, verb, &self.args, self.yields)?;
        Ok(Running { process, deadline: self.deadline, report: PhantomData })
    }

    /// Starts it, and waits for a first report; another one comes at its end.
    pub(crate) fn begin<F: DeserializeOwned>(self) -> Result<(Running<T>, F)> {
        let mut running = self.start()?;
        let first = next(&mut running.process, running.deadline)?;
        Ok((running, first))
    }

    /// Starts it, and waits for its report; it goes on until [`Holding::close`].
    pub(crate) fn holding(self) -> Result<(Holding, T)> {
        let deadline = self.deadline;
        let mut process = self.start()?.process;
        let report = next(&mut process, deadline)?;
        Ok((Holding { process, deadline }, report))
    }

    /// Runs it to its end.
    pub fn run(self) -> Result<T> {
        self.start()?.finish()
    }
}

impl<T: DeserializeOwned> Running<T> {
    /// Waits for its report.
    pub fn finish(self) -> Result<T> {
        let text = self.process.wait(self.deadline)?.ok()?;
        let last = text.lines().last().context("a client said nothing")?;
        serde_json::from_str(last).with_context(|| format!("report: {last}"))
    }
}

impl Call<'_, Held> {
    /// Opens the connections; they stay open until [`Holding::close`]. The report is that of the first check.
    pub fn open(self) -> Result<(Holding, Held)> {
        self.holding()
    }
}

impl Holding {
    /// Sends a byte on each connection and waits for its echo.
    pub fn check(&mut self) -> Result<Held> {
        self.process.tell("check")?;
        next(&mut self.process, self.deadline)
    }

    /// Closes all of them.
    pub fn close(mut self) -> Result<()> {
        self.process.close_stdin();
        self.process.wait(self.deadline)?.ok().map(drop)
    }
}

/// The next report of a client that goes on.
fn next<T: DeserializeOwned>(process: &mut Process, deadline: Duration) -> Result<T> {
    let line = process.next_line(deadline)?;
    serde_json::from_str(&line).with_context(|| format!("report: {line}"))
}
