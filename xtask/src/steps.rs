//! What was checked and what came of it: counts, names of what failed, and what could not run and why.

use std::{collections::BTreeSet, fmt::Write as _};

/// The sum of a run.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Tally {
    pub passed: u64,
    pub failed: u64,
    /// Names of what failed.
    pub failures: BTreeSet<String>,
    /// What could not run, with the reason.
    pub skipped: Vec<String>,
}

impl Tally {
    /// One check that is no test of a harness.
    pub fn check(&mut self, name: &str, good: bool) {
        if good {
            self.passed += 1;
        } else {
            self.failed += 1;
            self.failures.insert(name.to_owned());
        }
    }

    /// Notes tests that ran, said that they could not, and were counted as passed by their harness.
    pub fn skip_passed(&mut self, notes: impl IntoIterator<Item = String>) {
        for note in notes {
            self.passed = self.passed.saturating_sub(1);
            self.skipped.push(note);
        }
    }

    /// Reads a line of `cargo nextest run` or `cargo test`.
    pub fn read(&mut self, line: &str) {
        if let Some((_, counts)) = line.split_once("tests run:").or_else(|| line.split_once("test run:")) {
            self.add(counts.split(','));
        } else if let Some(counts) = line.strip_prefix("test result:") {
            let counts = counts.split_once(". ").map_or(counts, |(_, rest)| rest);
            self.add(counts.split(';'));
        } else if let Some(name) = line.strip_prefix("test ").and_then(|rest| rest.strip_suffix(" ... FAILED")) {
            self.failures.insert(name.to_owned());
        } else if let Some(name) = nextest_failure(line) {
            self.failures.insert(name);
        }
    }

    fn add<'a>(&mut self, counts: impl Iterator<Item = &'a str>) {
        for count in counts {
            let mut words = count.split_whitespace();
            let (Some(Ok(number)), Some(word)) = (words.next().map(str::parse::<u64>), words.next()) else { continue };
            match word {
                "passed" => self.passed += number,
                "failed" | "timed" | "exec" => self.failed += number,
                // nextest calls skipped what was not selected.
                _ => {}
            }
        }
    }

    /// The closing words; the last line is `N passed, N failed, N skipped`.
    #[must_use]
    pub fn summary(&self) -> String {
        let mut text = String::new();
        for (title, lines) in [
            ("Failed:", self.failures.iter().collect::<Vec<_>>()),
            ("Could not run here:", self.skipped.iter().collect()),
        ] {
            if !lines.is_empty() {
                let _ = writeln!(text, "{title}");
                for line in lines {
                    let _ = writeln!(text, "  {line}");
                }
            }
        }
        let _ = write!(text, "{} passed, {} failed, {} skipped", self.passed, self.failed, self.skipped.len());
        text
    }
}

/// The test's name in a line such as `        FAIL [   1.987s] ( 9/14) heddle-lab::lab a_name`.
fn nextest_failure(line: &str) -> Option<String> {
    let line = line.trim_start();
    let kind = ["FAIL [", "TIMEOUT [", "SIGABRT [", "SIGSEGV [", "SIGKILL ["];
    kind.iter().find(|kind| line.starts_with(*kind))?;
    let rest = line.split_once(']')?.1.trim_start();
    let rest = if rest.starts_with('(') { rest.split_once(')')?.1 } else { rest };
    Some(rest.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::Tally;

    #[test]
    fn both_harnesses_are_understood() {
        let mut tally = Tally::default();
        for line in [
            "        FAIL [   1.987s] ( 9/14) heddle-lab::lab a_dropped_lab_leaves_nothing",
            "     Summary [   3.714s] 10/14 tests run: 8 passed (1 slow), 1 failed, 1 timed out, 4 skipped",
            "test result: FAILED. 3 passed; 1 failed; 0 ignored; 0 measured; 6 filtered out; finished in 1.96s",
            "test policy::tests::x ... FAILED",
        ] {
            tally.read(line);
        }
        assert_eq!((tally.passed, tally.failed, tally.failures.len()), (11, 3, 2));
    }

    #[test]
    fn a_test_that_skipped_itself_did_not_pass() {
        let mut tally = Tally { passed: 2, ..Tally::default() };
        tally.skip_passed(["a: needs root".to_owned()]);
        assert!(tally.summary().ends_with("1 passed, 0 failed, 1 skipped"));
    }
}
