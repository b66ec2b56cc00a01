//! The programs on the kubelet's own cgroup: hung, moved to another cgroup, and taken off again.
//!
//! Beside the journey. Which cgroup is the kubelet's is found elsewhere; here it is only made sure that it is no pod's. The
//! programs are pinned, so that probes go on without this process. It never leaves a connection vouched for of a cgroup that
//! the programs hang on no more.

use std::{fs, io, path::Path};

use heddle_common::{Kubelet, attested_by, globals, programs};

use super::{
    CaptureError,
    kernel::{self, Hook, Target},
    load::{self, Cgroup},
    pin,
    pod::Node,
};
use crate::causes;

/// What ends a connection's pass hangs before anything makes one.
const PROGRAMS: [(&str, Hook); 3] =
    [(programs::KUBELET, Hook::SockOps), (programs::KUBELET4, Hook::Connect4), (programs::KUBELET6, Hook::Connect6)];

/// Hangs the programs on this cgroup, those of an earlier agent replaced in place, and takes them off any other.
pub fn attach(node: &Node, path: &Path) -> Result<(), CaptureError> {
    let failed = |detail: String| CaptureError::Kubelet { cgroup: path.to_owned(), detail };
    let io = |error: io::Error| failed(error.to_string());
    let cgroup = Cgroup::open(path).map_err(io)?;
    if let Some(pod) = node.pods().iter().find(|pod| pod.live().is_some_and(|live| live.cgroup.id() == cgroup.id())) {
        return Err(failed(format!("it is that of pod {}", pod.name())));
    }
    let netns = match node.home.cookie() {
        Ok(cookie) => cookie,
        // Before Linux 5.14 no program asks for it.
        Err(error) if error.raw_os_error() == Some(libc::ENOPROTOOPT) => 0,
        Err(error) => return Err(io(error)),
    };
    let kubelet = Kubelet { cgroup: cgroup.id(), netns };
    let loaded = load::instance(&node.pins.maps(), (globals::KUBELET, (&kubelet).into()), PROGRAMS).map_err(failed)?;
    let folder = node.pins.kubelet();
    fs::create_dir_all(&folder).map_err(io)?;
    for ((name, hook), (program, _)) in PROGRAMS.into_iter().zip(&loaded) {
        let at = folder.join(name);
        let old = load::existing(&at).map_err(io)?;
        if let Some((link, info)) = &old
            && load::hangs(info, hook, 0, cgroup.id())
            && kernel::relink(link, program).is_ok()
        {
            continue;
        }
        let link = kernel::link(program, &cgroup, hook).map_err(io)?;
        load::pin_over(&link, &at).map_err(io)?;
        if let Some((old, _)) = old {
            take_off(&old).map_err(io)?;
        }
    }
    node.maps.sweep_attested(|by| by.by == attested_by::KUBELET && by.source != cgroup.id())?;
    tracing::info!(cgroup = %path.display(), "vouching for the kubelet's probes");
    Ok(())
}

/// Takes the programs off. Whether there were any.
pub fn release(node: &Node) -> Result<bool, CaptureError> {
    let folder = node.pins.kubelet();
    let failed = |error: io::Error| CaptureError::Kubelet { cgroup: folder.clone(), detail: causes::told(&error) };
    if !folder.try_exists().map_err(failed)? {
        return Ok(false);
    }
    for (name, _) in PROGRAMS.iter().rev() {
        let at = folder.join(name);
        if let Some((link, _)) = load::existing(&at).map_err(failed)? {
            take_off(&link).map_err(failed)?;
            pin::remove_if_there(&at).map_err(failed)?;
        }
    }
    pin::remove(&folder).map_err(failed)?;
    node.maps.sweep_attested(|by| by.by == attested_by::KUBELET)?;
    Ok(true)
}

/// The cgroup that all of the programs hang on, if there is one.
pub fn attached(node: &Node) -> Result<Option<u64>, CaptureError> {
    let folder = node.pins.kubelet();
    let failed = |error: io::Error| CaptureError::Kubelet { cgroup: folder.clone(), detail: causes::told(&error) };
    let mut all = None;
    for (name, hook) in PROGRAMS {
        let id = match load::existing(&folder.join(name)).map_err(failed)? {
            // Zero once the cgroup is gone.
            Some((_, info)) if info.attach_type == hook as u32 => match info.target {
                Target::Cgroup(id) if id != 0 => id,
                _ => return Ok(None),
            },
            _ => return Ok(None),
        };
        if all.is_some_and(|other| other != id) {
            return Ok(None);
        }
        all = Some(id);
    }
    Ok(all)
}

/// Detaches a link now; one whose cgroup is gone is detached already.
fn take_off(link: &std::os::fd::OwnedFd) -> io::Result<()> {
    match kernel::link_info(link)?.target {
        Target::Cgroup(0) => Ok(()),
        _ => kernel::unlink(link),
    }
}
