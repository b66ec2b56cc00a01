//! Installing into folders as CNIs leave them, and away again.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
        mpsc,
    },
    thread,
    time::Duration,
};

use serde_json::Value;

use super::*;

const LIST: &str = r#"{"cniVersion": "1.0.0", "name": "net", "plugins": [{"type": "bridge"}]}"#;
const SINGLE: &str = r#"{"cniVersion": "1.0.0", "name": "net", "type": "bridge"}"#;

struct Node {
    folder: tempfile::TempDir,
    install: Install,
}

fn node(files: &[(&str, &str)]) -> Node {
    let folder = tempfile::tempdir().unwrap();
    let (bin, conf) = (folder.path().join("bin"), folder.path().join("net.d"));
    fs::create_dir(&bin).unwrap();
    fs::create_dir(&conf).unwrap();
    let program = folder.path().join("the-plugin");
    fs::write(&program, "program").unwrap();
    for (name, text) in files {
        fs::write(conf.join(name), text).unwrap();
    }
    let entry = Entry { socket: "/run/heddle/cni.sock".into(), state_dir: "/var/lib/heddle".into() };
    let install = Install { program, bin_dir: Some(bin), conf_dir: conf, entry };
    Node { folder, install }
}

impl Node {
    fn conf(&self, name: &str) -> PathBuf {
        self.install.conf_dir.join(name)
    }

    fn text(&self, name: &str) -> String {
        fs::read_to_string(self.conf(name)).unwrap()
    }

    fn plugin(&self) -> PathBuf {
        self.folder.path().join("bin").join(PLUGIN)
    }

    fn remove(&self) -> Vec<PathBuf> {
        remove(&self.folder.path().join("bin"), &self.install.conf_dir).unwrap()
    }

    fn leftovers(&self) -> Vec<PathBuf> {
        leftovers(&self.folder.path().join("bin"), &self.install.conf_dir).unwrap()
    }

    fn names(&self) -> Vec<String> {
        let names = entries(&self.install.conf_dir).unwrap().into_iter();
        names.map(|path| path.file_name().unwrap().to_str().unwrap().to_owned()).collect()
    }
}

fn has_entry(text: &str) -> bool {
    text.contains("\"heddle-cni\"")
}

#[test]
fn the_first_network_by_name_gets_the_entry_and_no_other() {
    let node = node(&[
        ("00-note.txt", "not a network"),
        ("05-broken.conflist", "{"),
        ("06-empty.conflist", "{\"plugins\": []}"),
        ("10-net.conflist", LIST),
        ("20-other.conflist", LIST),
    ]);
    fs::set_permissions(node.conf("10-net.conflist"), Permissions::from_mode(0o640)).unwrap();
    assert_eq!(node.install.ensure().unwrap(), node.conf("10-net.conflist"));
    assert!(has_entry(&node.text("10-net.conflist")));
    assert_eq!(fs::metadata(node.conf("10-net.conflist")).unwrap().mode() & 0o777, 0o640);
    assert_eq!(node.text("20-other.conflist"), LIST);
    assert_eq!(node.text("05-broken.conflist"), "{");
    assert_eq!(fs::read(node.plugin()).unwrap(), b"program");
    assert_eq!(fs::metadata(node.plugin()).unwrap().mode() & 0o777, 0o755);
    assert_eq!(node.names().len(), 5, "nothing is left beside them");
}

#[test]
fn what_is_right_is_not_written_again_and_another_program_is() {
    let node = node(&[("10-net.conflist", LIST)]);
    node.install.ensure().unwrap();
    let inodes = || [node.conf("10-net.conflist"), node.plugin()].map(|path| fs::metadata(path).unwrap().ino());
    let before = inodes();
    node.install.ensure().unwrap();
    assert_eq!(inodes(), before);
    fs::write(&node.install.program, "newer!!").unwrap();
    node.install.ensure().unwrap();
    assert_eq!(fs::read(node.plugin()).unwrap(), b"newer!!");
    fs::set_permissions(node.plugin(), Permissions::from_mode(0o644)).unwrap();
    node.install.ensure().unwrap();
    assert_eq!(fs::metadata(node.plugin()).unwrap().mode() & 0o777, 0o755);
}

#[test]
fn removing_leaves_everything_as_it_was_found() {
    let node = node(&[("10-net.conflist", LIST), ("20-other.conflist", LIST)]);
    node.install.ensure().unwrap();
    assert_eq!(node.leftovers(), [node.conf("10-net.conflist"), node.plugin()]);
    assert_eq!(node.remove(), [node.conf("10-net.conflist"), node.plugin()]);
    let value = |text: &str| serde_json::from_str::<Value>(text).unwrap();
    assert_eq!(value(&node.text("10-net.conflist")), value(LIST));
    assert_eq!((node.remove(), node.leftovers()), (Vec::new(), Vec::new()));
}

#[test]
fn a_single_plugins_file_is_kept_and_comes_back() {
    let node = node(&[("10-net.conf", SINGLE)]);
    assert_eq!(node.install.ensure().unwrap(), node.conf("10-net.conflist"));
    assert_eq!(node.names(), ["10-net.conf.heddle-kept", "10-net.conflist"]);
    assert_eq!(node.install.ensure().unwrap(), node.conf("10-net.conflist"));
    assert_eq!(node.names(), ["10-net.conf.heddle-kept", "10-net.conflist"]);
    // Its CNI writes it again, with something new.
    let newer = SINGLE.replace("net\"", "net2\"");
    fs::write(node.conf("10-net.conf"), &newer).unwrap();
    node.install.ensure().unwrap();
    assert!(node.text("10-net.conflist").contains("net2"));
    assert_eq!(node.remove(), [node.conf("10-net.conflist"), node.plugin()]);
    assert_eq!(node.names(), ["10-net.conf"]);
    assert_eq!(node.text("10-net.conf"), newer);
    assert_eq!(node.leftovers(), [] as [PathBuf; 0]);
}

#[test]
fn a_file_name_in_an_entry_leads_nowhere_else() {
    let list = r#"{"plugins": [{"type": "bridge"}, {"type": "heddle-cni", "madeFrom": "../bin/heddle-cni"}]}"#;
    let node = node(&[("10-net.conflist", list)]);
    fs::write(node.plugin(), "program").unwrap();
    node.remove();
    assert!(!has_entry(&node.text("10-net.conflist")) && node.text("10-net.conflist").contains("bridge"));
}

#[test]
fn what_can_not_be_done_is_told_with_its_reason() {
    let reason = |node: &Node| node.install.ensure().unwrap_err().reason();
    assert_eq!(reason(&node(&[])), "cni_no_network");
    assert_eq!(reason(&node(&[("10-old.conflist", &LIST.replace("1.0.0", "0.2.0"))])), "cni_list_version");
    let large = format!("{LIST}{}", " ".repeat(limits::CNI_LIST as usize));
    assert_eq!(reason(&node(&[("10-large.conflist", &large)])), "cni_too_large");
    let mut gone = node(&[("10-net.conflist", LIST)]);
    gone.install.program = "/nowhere/heddle-cni".into();
    assert_eq!(reason(&gone), "cni_io");
    assert_eq!(gone.text("10-net.conflist"), LIST, "an entry without a program would stop every pod");
    let mut absent = node(&[]);
    absent.install.conf_dir = absent.folder.path().join("not-there");
    assert_eq!(reason(&absent), "cni_no_network");
    assert!(remove(Path::new("/nowhere/bin"), &absent.install.conf_dir).unwrap().is_empty());
}

#[test]
fn an_entry_that_the_cni_writes_over_comes_back() {
    let node = node(&[]);
    let stop = Arc::new(AtomicBool::new(false));
    let (told, outcomes) = mpsc::channel();
    let keeping = {
        let (install, stop) = (node.install.clone(), Arc::clone(&stop));
        thread::spawn(move || {
            install.keep(
                || stop.load(Ordering::Relaxed),
                |outcome| {
                    let _nobody_listens_any_more = told.send(outcome.as_ref().map_err(InstallError::reason).cloned());
                },
            );
        })
    };
    let soon = Duration::from_secs(30);
    assert_eq!(outcomes.recv_timeout(soon).unwrap(), Err("cni_no_network"));
    // As CNIs write it: beside, and moved.
    let write = |text: &str| {
        fs::write(node.folder.path().join("new"), text).unwrap();
        fs::rename(node.folder.path().join("new"), node.conf("10-net.conflist")).unwrap();
    };
    write(LIST);
    assert_eq!(outcomes.recv_timeout(soon).unwrap(), Ok(node.conf("10-net.conflist")));
    write(LIST);
    let deadline = Instant::now() + soon;
    while !has_entry(&node.text("10-net.conflist")) {
        assert!(Instant::now() < deadline, "the entry did not come back");
        thread::sleep(Duration::from_millis(5));
    }
    stop.store(true, Ordering::Relaxed);
    keeping.join().unwrap();
}
