//! Packages of any suite of Debian, downloaded and unpacked beside the system: by apt with a configuration, lists and cache of its own.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, bail, ensure};

use crate::console::quietly;

const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

/// A suite, with its lists read.
#[derive(Debug)]
pub struct Suite {
    name: String,
    work: PathBuf,
}

impl Suite {
    /// Reads the lists of a suite such as `unstable` into `work`.
    ///
    /// # Errors
    /// Where this is no Debian, or the archive can't be reached.
    pub fn open(name: &str, work: &Path) -> Result<Self> {
        ensure!(Path::new(KEYRING).exists(), "no {KEYRING}");
        for directory in ["lists/partial", "cache/archives/partial"] {
            fs::create_dir_all(work.join(directory))?;
        }
        let list = work.join("sources.list");
        fs::write(&list, format!("deb [signed-by={KEYRING}] {} {name} main\n", archive()?))?;
        let here = work.display();
        fs::write(
            work.join("apt.conf"),
            format!(
                "Dir::Etc::sourcelist \"{}\";\nDir::Etc::sourceparts \"-\";\nDir::State::lists \"{here}/lists\";\n\
                 Dir::Cache \"{here}/cache\";\nAPT::Sandbox::User \"root\";\n",
                list.display()
            ),
        )?;
        let suite = Self { name: name.to_owned(), work: work.to_owned() };
        suite.apt("apt-get", &["update"])?;
        Ok(suite)
    }

    fn apt(&self, program: &str, arguments: &[&str]) -> Result<String> {
        let configuration = self.work.join("apt.conf");
        quietly(Command::new(program).env("APT_CONFIG", configuration).current_dir(&self.work).args(arguments))
    }

    /// The first package that a metapackage depends on and whose name begins so.
    ///
    /// # Errors
    /// Where there is none.
    pub fn dependency(&self, metapackage: &str, start: &str) -> Result<String> {
        let told = self.apt("apt-cache", &["depends", "--no-recommends", "--no-suggests", metapackage])?;
        let depends = told.lines().filter_map(|line| line.trim().strip_prefix("Depends: "));
        let found = depends.map(str::trim).find(|name| name.starts_with(start));
        let name = &self.name;
        found.map(str::to_owned).with_context(|| format!("{metapackage} of {name} depends on no {start}…"))
    }

    /// Downloads a package and unpacks it into `into`.
    ///
    /// # Errors
    /// Where it can't be had.
    pub fn unpack(&self, package: &str, into: &Path) -> Result<()> {
        self.apt("apt-get", &["download", package])?;
        let start = format!("{package}_");
        let Some(file) = newest(&self.work, |name| name.starts_with(&start) && name.ends_with(".deb"))? else {
            bail!("apt-get download {package} left no file in {}", self.work.display());
        };
        fs::create_dir_all(into)?;
        quietly(Command::new("dpkg-deb").arg("-x").arg(&file).arg(into))?;
        fs::remove_file(&file).with_context(|| file.display().to_string())
    }
}

/// The last entry, by name, of a folder whose name fits.
pub fn newest(folder: &Path, fits: impl Fn(&str) -> bool) -> Result<Option<PathBuf>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).with_context(|| folder.display().to_string())? {
        let entry = entry?;
        if fits(&entry.file_name().to_string_lossy()) {
            found.push(entry.path());
        }
    }
    found.sort();
    Ok(found.pop())
}

/// The Debian archive that this machine's own apt is set up for.
fn archive() -> Result<String> {
    let format = ["indextargets", "--format", "$(ORIGIN) $(SUITE) $(REPO_URI)", "Identifier: Packages"];
    let targets = quietly(Command::new("apt-get").args(format))?;
    let archive = targets.lines().find_map(|line| {
        let (origin, rest) = line.split_once(' ')?;
        let uri = rest.rsplit(' ').next()?;
        (origin == "Debian" && !rest.contains("security")).then(|| uri.to_owned())
    });
    archive.context("apt knows no Debian archive (run apt-get update)")
}
