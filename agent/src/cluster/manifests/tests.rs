use std::{fs, os::unix::fs::symlink, path::PathBuf};

use super::{Directory, InForce, is_manifest, limits};

struct Lab {
    folder: tempfile::TempDir,
    directory: Directory,
}

impl Lab {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let directory = Directory::new(folder.path().to_owned());
        Self { folder, directory }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn write(&self, name: &str, text: &str) -> &Self {
        fs::write(self.path(name), text).unwrap();
        self
    }

    /// Names of the pods in force after another look.
    fn pods(&mut self) -> Vec<String> {
        self.directory.scan().unwrap();
        let objects = self.directory.objects();
        objects.iter().flat_map(|part| &part.pods).map(|pod| pod.metadata.name.clone().unwrap()).collect()
    }

    /// File, reason and what is in force, of every problem.
    fn problems(&self) -> Vec<(String, &'static str, InForce)> {
        let name = |path: PathBuf| path.file_name().unwrap().to_string_lossy().into_owned();
        let problems = self.directory.problems().into_iter();
        problems.map(|problem| (name(problem.file.clone()), problem.error.reason(), problem.in_force)).collect()
    }
}

fn pod(name: &str) -> String {
    format!("---\n{{apiVersion: v1, kind: Pod, metadata: {{name: {name}}}, status: {{podIP: 10.0.0.1}}}}\n")
}

fn problem(file: &str, reason: &'static str, in_force: InForce) -> (String, &'static str, InForce) {
    (file.into(), reason, in_force)
}

#[test]
fn only_manifests_are_read() {
    for name in ["a.yaml", "a.yml", "a.json", "a.b.yaml"] {
        assert!(is_manifest(name), "{name}");
    }
    for name in [
        "a.txt",
        "yaml",
        ".a.yaml",
        ".#a.yaml",
        "#a.yaml",
        "#a.yaml#",
        "a.yaml~",
        "~a.yaml",
        ".a.yaml.swp",
        "a.yaml.tmp",
        "..data",
        "4913",
    ] {
        assert!(!is_manifest(name), "{name}");
    }
    let mut lab = Lab::new();
    fs::create_dir(lab.path("folder")).unwrap();
    fs::write(lab.path("folder").join("b.yaml"), pod("b")).unwrap();
    lab.write("a.yaml", &pod("a")).write("notes.txt", "?").write(".hidden.yaml", &pod("c"));
    assert_eq!(lab.pods(), ["a"]);
    assert_eq!(lab.problems(), []);
}

#[test]
fn changed_added_and_deleted_files_are_seen() {
    let mut lab = Lab::new();
    lab.write("a.yaml", &pod("a"));
    assert_eq!(lab.pods(), ["a"]);
    lab.write("a.yaml", &(pod("a1") + &pod("a2"))).write("b.yml", &pod("b"));
    assert_eq!(lab.pods(), ["a1", "a2", "b"]);
    fs::remove_file(lab.path("a.yaml")).unwrap();
    assert_eq!(lab.pods(), ["b"]);
}

#[test]
fn write_of_the_same_size_in_the_same_tick_is_seen() {
    let mut lab = Lab::new();
    for name in ["a", "b", "c", "d"] {
        lab.write("a.yaml", &pod(name));
        assert_eq!(lab.pods(), [name]);
    }
}

#[test]
fn malformed_file_keeps_its_last_good_state_until_it_is_mended_or_deleted() {
    let mut lab = Lab::new();
    lab.write("a.yaml", &(pod("a1") + &pod("a2"))).write("b.yaml", &pod("b"));
    assert_eq!(lab.pods(), ["a1", "a2", "b"]);
    for (broken, reason) in [
        ("kind: [", "manifest_syntax"),
        (&(pod("a3") + "---\napiVersion: v1\nkind: Pod\n"), "manifest_object"),
        ("\u{0}", "manifest_syntax"),
    ] {
        lab.write("a.yaml", broken).write("b.yaml", &pod("b"));
        assert_eq!(lab.pods(), ["a1", "a2", "b"], "{broken}");
        assert_eq!(lab.problems(), [problem("a.yaml", reason, InForce::LastGood)], "{broken}");
    }
    lab.write("a.yaml", &pod("a4"));
    assert_eq!(lab.pods(), ["a4", "b"]);
    assert_eq!(lab.problems(), []);
    lab.write("a.yaml", "kind: [");
    assert_eq!(lab.pods(), ["a4", "b"]);
    fs::remove_file(lab.path("a.yaml")).unwrap();
    assert_eq!(lab.pods(), ["b"]);
    assert_eq!(lab.problems(), []);
}

#[test]
fn problem_names_file_object_and_field() {
    let mut lab = Lab::new();
    lab.write("a.yaml", "apiVersion: v1\nkind: Pod\nmetadata: {name: web, namespace: shop}\nspec: {hostNetwork: 7}\n");
    lab.pods();
    let problem = &lab.directory.problems()[0];
    assert_eq!(problem.file, lab.path("a.yaml"));
    assert_eq!((problem.error.object(), problem.error.field()), (Some("Pod shop/web"), Some("spec.hostNetwork")));
    assert!(!problem.error.fix().is_empty());
}

#[test]
fn file_that_was_never_good_counts_as_far_as_it_is_readable() {
    let mut lab = Lab::new();
    lab.write("a.yaml", &(pod("a") + "---\nkind: [\n"));
    assert_eq!(lab.pods(), ["a"]);
    assert_eq!(lab.problems(), [problem("a.yaml", "manifest_syntax", InForce::Readable)]);
    lab.write("a.yaml", "kind: [\n---\n{apiVersion: v1, kind: Pod, metadata: {name: b}}\n");
    assert_eq!(lab.pods(), ["b"], "not the last good state: there was none");
}

#[test]
fn invalid_policy_is_in_force_and_told_of_and_costs_the_file_nothing() {
    const POLICY: &str =
        "---\napiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {name: p}\nspec: {x: 1}\n";
    let mut lab = Lab::new();
    lab.write("a.yaml", &(pod("a") + POLICY));
    assert_eq!(lab.pods(), ["a"]);
    assert_eq!(lab.problems(), [problem("a.yaml", "policy_invalid", InForce::Current)]);
    assert_eq!(lab.directory.objects()[0].invalid_policies.len(), 1);
    // What is in force stays on the list when the file breaks.
    lab.write("a.yaml", "kind: [");
    assert_eq!(lab.pods(), ["a"]);
    let expected = [
        problem("a.yaml", "manifest_syntax", InForce::LastGood),
        problem("a.yaml", "policy_invalid", InForce::Current),
    ];
    assert_eq!(lab.problems(), expected);
    lab.write("a.yaml", "kind: {");
    lab.pods();
    assert_eq!(lab.problems(), expected);
    assert_eq!(lab.directory.objects()[0].invalid_policies.len(), 1);
}

#[test]
fn file_that_is_too_large_or_no_text_or_no_file_keeps_the_last_good_state() {
    let mut lab = Lab::new();
    lab.write("a.yaml", &pod("a"));
    assert_eq!(lab.pods(), ["a"]);
    let size = usize::try_from(limits::MANIFEST_BYTES).unwrap();
    lab.write("a.yaml", &(pod("x") + &"#".repeat(size)));
    assert_eq!(lab.pods(), ["a"]);
    assert_eq!(lab.problems(), [problem("a.yaml", "manifest_too_large", InForce::LastGood)]);
    fs::write(lab.path("a.yaml"), [0xff, 0xfe]).unwrap();
    assert_eq!(lab.pods(), ["a"]);
    assert_eq!(lab.problems(), [problem("a.yaml", "manifest_syntax", InForce::LastGood)]);
    fs::remove_file(lab.path("a.yaml")).unwrap();
    // Opening a FIFO for reading would wait for a writer for ever.
    nix::unistd::mkfifo(&lab.path("a.yaml"), nix::sys::stat::Mode::S_IRWXU).unwrap();
    assert_eq!(lab.pods(), ["a"]);
    assert_eq!(lab.problems(), [problem("a.yaml", "manifest_unreadable", InForce::LastGood)]);
    let exactly = pod("b");
    fs::remove_file(lab.path("a.yaml")).unwrap();
    lab.write("a.yaml", &(exactly.clone() + &"\n".repeat(size - exactly.len())));
    assert_eq!(lab.pods(), ["b"]);
}

#[test]
fn atomic_renames_are_seen() {
    let mut lab = Lab::new();
    lab.write("a.yaml", &pod("a"));
    assert_eq!(lab.pods(), ["a"]);
    lab.write("a.yaml.tmp", &pod("b"));
    assert_eq!(lab.pods(), ["a"]);
    fs::rename(lab.path("a.yaml.tmp"), lab.path("a.yaml")).unwrap();
    assert_eq!(lab.pods(), ["b"]);
}

#[test]
fn volume_of_a_config_map_is_followed_through_its_links() {
    let mut lab = Lab::new();
    for (generation, name) in [("..1", "a"), ("..2", "b")] {
        fs::create_dir(lab.path(generation)).unwrap();
        fs::write(lab.path(generation).join("pods.yaml"), pod(name)).unwrap();
    }
    symlink("..1", lab.path("..data")).unwrap();
    symlink("..data/pods.yaml", lab.path("pods.yaml")).unwrap();
    assert_eq!(lab.pods(), ["a"]);
    symlink("..2", lab.path("..data_tmp")).unwrap();
    fs::rename(lab.path("..data_tmp"), lab.path("..data")).unwrap();
    assert_eq!(lab.pods(), ["b"]);
    // A key that went: its link dangles for a moment.
    fs::remove_file(lab.path("..2").join("pods.yaml")).unwrap();
    assert_eq!(lab.pods(), Vec::<String>::new());
    assert_eq!(lab.problems(), []);
}

#[test]
fn object_in_two_files_is_reported_and_the_later_file_holds() {
    let mut lab = Lab::new();
    lab.write("a.yaml", &pod("a")).write("b.yaml", &pod("a"));
    lab.pods();
    assert_eq!(lab.problems(), [problem("b.yaml", "manifest_duplicate", InForce::Current)]);
}

#[test]
fn directory_that_went_changes_nothing() {
    let mut lab = Lab::new();
    lab.write("a.yaml", &pod("a"));
    assert_eq!(lab.pods(), ["a"]);
    let aside = lab.folder.path().with_extension("aside");
    fs::rename(lab.folder.path(), &aside).unwrap();
    assert!(lab.directory.scan().is_err());
    assert_eq!(lab.directory.objects()[0].pods.len(), 1);
    assert_eq!(lab.directory.problems()[0].error.reason(), "manifest_unreadable");
    fs::rename(&aside, lab.folder.path()).unwrap();
    assert_eq!(lab.pods(), ["a"]);
    assert_eq!(lab.problems(), []);
}

#[test]
fn directory_with_too_many_files_changes_nothing() {
    let mut lab = Lab::new();
    lab.write("a.yaml", &pod("a"));
    assert_eq!(lab.pods(), ["a"]);
    for number in 0..limits::MANIFEST_FILES {
        lab.write(&format!("b{number}.yaml"), "");
    }
    lab.write("a.yaml", &pod("z"));
    assert_eq!(lab.pods(), ["a"]);
    assert_eq!(lab.problems()[0].1, "manifest_too_many_files");
    fs::remove_file(lab.path("b0.yaml")).unwrap();
    assert_eq!(lab.pods(), ["z"]);
    assert_eq!(lab.problems(), []);
}

impl Lab {
    /// File and namespace of every gap after another look.
    fn gaps(&mut self) -> Vec<(String, Option<String>)> {
        self.directory.scan().unwrap();
        let parts = self.directory.objects();
        let gaps = parts.iter().flat_map(|part| &part.policy_gaps);
        gaps.map(|gap| {
            let name = std::path::Path::new(&*gap.source).file_name().unwrap().to_string_lossy().into_owned();
            (name, gap.namespace.as_ref().map(ToString::to_string))
        })
        .collect()
    }
}

#[test]
fn only_a_file_without_a_good_state_leaves_a_gap_until_it_is_mended_or_removed() {
    const TORN: &str = "kind: AuthorizationPolicy\nmetadata:\n  namespace: shop\nspec: [\n";
    let shop = |file: &str| (file.to_owned(), Some("shop".to_owned()));
    let mut lab = Lab::new();
    lab.write("good.yaml", &pod("a"));
    assert_eq!(lab.gaps(), []);
    lab.write("good.yaml", TORN).write("new.yaml", TORN);
    assert_eq!(lab.gaps(), [shop("new.yaml")], "the last good state of the other goes on");
    lab.write("new.yaml", &pod("b"));
    assert_eq!(lab.gaps(), []);
    lab.write("other.yaml", "kind: [\n");
    assert_eq!(lab.gaps(), [("other.yaml".to_owned(), None)]);
    fs::remove_file(lab.path("other.yaml")).unwrap();
    assert_eq!(lab.gaps(), []);
    // After a restart nobody knows the last good state.
    lab.directory = Directory::new(lab.folder.path().to_owned());
    assert_eq!(lab.gaps(), [shop("good.yaml")]);
}

#[test]
fn a_file_that_was_never_read_leaves_a_gap_everywhere_and_is_not_news_at_each_look() {
    let mut lab = Lab::new();
    nix::unistd::mkfifo(&lab.path("a.yaml"), nix::sys::stat::Mode::S_IRWXU).unwrap();
    assert_eq!(lab.gaps(), [("a.yaml".to_owned(), None)]);
    assert!(!lab.directory.scan().unwrap(), "nothing is new");
    for number in 0..=limits::MANIFEST_FILES {
        lab.write(&format!("b{number}.yaml"), "");
    }
    lab.directory = Directory::new(lab.folder.path().to_owned());
    let folder = lab.folder.path().file_name().unwrap().to_string_lossy().into_owned();
    assert!(lab.gaps().contains(&(folder, None)), "files beyond the cap were not read");
}
