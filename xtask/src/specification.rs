//! What SPECIFICATION.md promises is shown by something that exists: a lab test, a unit test, a row of the bench; and the
//! limits in it are those of `limits.rs`, letter for letter.
//!
//! It reads ``lab `file::claim` ``, ``unit `path::tests::claim` ``, ``bench `place/row` `` and ``limit `NAME = value` ``, wherever
//! they stand.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, ensure};

use crate::console::{root, target};

const KINDS: [&str; 4] = ["lab", "unit", "bench", "limit"];

/// A proof that the document names.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Named<'a> {
    kind: &'static str,
    name: &'a str,
}

/// Checks the document; gives how many promises it makes.
pub fn check() -> Result<usize> {
    let text = fs::read_to_string(root().join("SPECIFICATION.md")).context("SPECIFICATION.md")?;
    let bench = bench_rows()?;
    let limits = fs::read_to_string(root().join("agent/src/life/limits.rs")).context("limits.rs")?;
    let mut wrong: Vec<String> = Vec::new();
    for Named { kind, name } in all(&text) {
        let there = match kind {
            "lab" => lab_test(name),
            "unit" => unit_test(name),
            "bench" => bench.contains(name),
            _ => limit(&limits, name),
        };
        if !there {
            wrong.push(format!("there is no {kind} {name}"));
        }
    }
    let rows = promises(&text);
    wrong.extend(rows.iter().filter(|row| named(row).next().is_none()).map(|row| format!("shown by nothing: {row}")));
    let promised: BTreeSet<&str> = all(&text).into_iter().filter(|one| one.kind == "lab").map(|one| one.name).collect();
    let tests = lab_tests_with_an_id()?;
    wrong.extend(
        tests.iter().filter(|test| !promised.contains(test.as_str())).map(|test| format!("not promised: {test}")),
    );
    ensure!(wrong.is_empty(), "SPECIFICATION.md:\n  {}", wrong.join("\n  "));
    Ok(rows.len())
}

fn all(text: &str) -> BTreeSet<Named<'_>> {
    text.lines().flat_map(named).collect()
}

/// Lines of tables that promise something: neither heads nor rules.
fn promises(text: &str) -> Vec<&str> {
    let next = text.lines().skip(1).chain([""]);
    let rows = text.lines().zip(next).filter(|(line, next)| line.starts_with("| ") && !next.starts_with("|-"));
    rows.map(|(line, _)| line).collect()
}

/// The proofs that a line names.
fn named(line: &str) -> impl Iterator<Item = Named<'_>> {
    KINDS.into_iter().flat_map(move |kind| {
        line.match_indices(kind).filter_map(move |(at, _)| {
            let own_word = at == 0 || line.get(..at)?.ends_with([' ', '|', '(']);
            let (name, _) = line.get(at + kind.len()..)?.strip_prefix(" `")?.split_once('`')?;
            own_word.then_some(Named { kind, name })
        })
    })
}

/// A path of modules below tests/tests.
fn lab_test(name: &str) -> bool {
    let Some((modules, claim)) = name.rsplit_once("::") else { return false };
    has_test(&root().join("tests/tests").join(modules.replace("::", "/")).with_extension("rs"), claim)
}

/// A path of modules below agent/src, the last one inline or not.
fn unit_test(name: &str) -> bool {
    let Some((modules, claim)) = name.rsplit_once("::") else { return false };
    let inside = modules.rsplit_once("::").map(|(outer, _)| outer);
    [Some(modules), inside].into_iter().flatten().any(|modules| {
        let base = root().join("agent/src").join(modules.replace("::", "/"));
        let files: [PathBuf; 2] = [base.with_extension("rs"), base.join("mod.rs")];
        files.iter().any(|file| has_test(file, claim))
    })
}

fn has_test(file: &Path, claim: &str) -> bool {
    let text = fs::read_to_string(file).unwrap_or_default();
    text.lines().any(|line| line.trim_start().trim_start_matches("async ").starts_with(&format!("fn {claim}(")))
}

/// `NAME = value`, as it stands in limits.rs.
fn limit(limits: &str, wanted: &str) -> bool {
    let Some((name, value)) = wanted.split_once(" = ") else { return false };
    let line = limits.lines().find(|line| line.starts_with(&format!("pub const {name}:")));
    line.and_then(|line| line.split_once(" = ")).is_some_and(|(_, stated)| stated == format!("{value};"))
}

fn bench_rows() -> Result<BTreeSet<String>> {
    let lab = target().join("debug/heddle-lab");
    let output = Command::new(&lab).args(["bench", "--list"]).output().context("running heddle-lab bench --list")?;
    ensure!(output.status.success(), "heddle-lab bench --list: {}", output.status);
    Ok(String::from_utf8_lossy(&output.stdout).lines().map(str::to_owned).collect())
}

/// Lab tests named for an id of the list of abuses and outages, such as `a1_…`: each keeps a promise that has to be stated.
fn lab_tests_with_an_id() -> Result<Vec<String>> {
    let mut found = Vec::new();
    let top = root().join("tests/tests");
    let mut folders = vec![top.clone()];
    let mut files = Vec::new();
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).with_context(|| folder.display().to_string())? {
            let entry = entry?;
            if entry.file_type()?.is_dir() { &mut folders } else { &mut files }.push(entry.path());
        }
    }
    for path in files {
        let modules = path.strip_prefix(&top)?.with_extension("");
        let modules: Vec<_> = modules.iter().map(|module| module.to_string_lossy()).collect();
        let modules = modules.join("::");
        let text = fs::read_to_string(&path)?;
        found.extend(text.lines().filter_map(|line| {
            let claim = line.strip_prefix("fn ")?.split_once('(')?.0;
            let mut id = claim.split_once('_')?.0.chars();
            // Letters of the ids in use.
            let letter = "afilorsw".contains(id.next()?);
            let digits = id.as_str();
            let is_id = letter && !digits.is_empty() && digits.bytes().all(|byte| byte.is_ascii_digit());
            is_id.then(|| format!("{modules}::{claim}"))
        }));
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::{Named, limit, named, promises};

    #[test]
    fn proofs_are_found_in_a_line() {
        let line = "| a | 5 s | lab `abuse::a1_x`, bench `cross_node/http_c1`; limit `TLS = Duration::from_secs(5)` |";
        let found: Vec<Named<'_>> = named(line).collect();
        assert_eq!(
            found,
            [("lab", "abuse::a1_x"), ("bench", "cross_node/http_c1"), ("limit", "TLS = Duration::from_secs(5)")]
                .map(|(kind, name)| Named { kind, name })
        );
        assert_eq!(named("a collab `x`, the lab says").count(), 0);
    }

    #[test]
    fn a_limit_must_be_stated_as_it_is() {
        let limits = "/// Why.\npub const TLS: Duration = Duration::from_secs(5);\n";
        assert!(limit(limits, "TLS = Duration::from_secs(5)"));
        assert!(!limit(limits, "TLS = Duration::from_secs(6)") && !limit(limits, "OTHER = 1"));
    }

    #[test]
    fn heads_of_tables_promise_nothing() {
        let text = "| what | value |\n|---|---|\n| a | b |\ntext\n";
        assert_eq!(promises(text), ["| a | b |"]);
    }
}
