//! The switches of a pod's netns that carry a packet's mark over to its answer.
//!
//! `tcp_fwmark_accept`: the app's accepted socket takes the mark of a delivery's SYN, so its answers go back to the delivery and
//! not out to the client. `fwmark_reflect`: so does the reset of a port where nobody listens; without it the reset goes to
//! the client, and the delivery waits for its deadline. Both are of marked packets only, and marks do not cross a veth. Only what was
//! off is switched on, and only that is switched off again.

use std::{fs, io, path::Path};

use super::netns::Netns;

/// Below `/proc/sys/net`, which shows the reader's own netns.
const SWITCHES: [&str; 3] = ["ipv4/tcp_fwmark_accept", "ipv4/fwmark_reflect", "ipv6/fwmark_reflect"];
const FOLDER: &str = "/proc/sys/net";

/// Those that are off; a family that the kernel does not have has none.
pub fn off(netns: &Netns) -> io::Result<Vec<String>> {
    netns.within(|| {
        let mut off = Vec::new();
        for name in SWITCHES {
            match fs::read_to_string(Path::new(FOLDER).join(name)) {
                Ok(text) if text.trim() == "0" => off.push(name.to_owned()),
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(named(name, &error)),
                _ => {}
            }
        }
        Ok(off)
    })
}

/// Switches `names` on or off; a name that is none of ours is left alone.
pub fn switch(netns: &Netns, names: &[String], on: bool) -> io::Result<()> {
    netns.within(|| {
        for name in SWITCHES.iter().filter(|name| names.iter().any(|wanted| wanted == *name)) {
            let value = if on { "1" } else { "0" };
            fs::write(Path::new(FOLDER).join(name), value).map_err(|error| named(name, &error))?;
        }
        Ok(())
    })
}

fn named(name: &str, error: &io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("{name}: {error}"))
}
