//! Keeps the plugin where the runtime looks for plugins, and its entry in the list that the runtime takes; and takes both away.
//!
//! Which list that is, is libcni's rule: of the files that end in `.conf`, `.conflist` or `.json`, the first by name that is a
//! network. Files are replaced whole. One that can't be understood is left alone and told of; a single plugin's file is kept
//! beside the list that is made of it, and comes back when heddle goes.

use std::{
    ffi::OsStr,
    fs::{self, File, Permissions},
    io::{self, Read, Write},
    os::unix::fs::{MetadataExt, PermissionsExt, chown},
    path::{Path, PathBuf},
    sync::mpsc::{RecvTimeoutError, sync_channel},
    time::Instant,
};

use notify::{RecursiveMode, Watcher};

use super::{
    PLUGIN,
    list::{self, Entry, ListError},
};
use crate::life::limits;

/// Ends the name under which a single plugin's file is kept: no runtime reads it.
const KEPT: &str = ".heddle-kept";

/// Why plugin or entry are not where they should be.
#[derive(Debug, thiserror::Error)]
pub enum InstallError {
    #[error("{}: {error}", path.display())]
    Io { path: PathBuf, error: io::Error },
    #[error("{} has no CNI network yet: the node's CNI has still to write its configuration there", .0.display())]
    NoNetwork(PathBuf),
    #[error("{}: {error}", path.display())]
    List { path: PathBuf, error: ListError },
    #[error("{} has more than {} files: give the folder of the CNI configuration", .0.display(), limits::CNI_LISTS)]
    TooMany(PathBuf),
    #[error("{} is larger than {} bytes, so it is no CNI configuration", .0.display(), limits::CNI_LIST)]
    TooLarge(PathBuf),
}

impl InstallError {
    /// Stable name: metric label and log key.
    #[must_use]
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Io { .. } => "cni_io",
            Self::NoNetwork(_) => "cni_no_network",
            Self::List { error, .. } => error.reason(),
            Self::TooMany(_) => "cni_too_many",
            Self::TooLarge(_) => "cni_too_large",
        }
    }
}

fn io_at(path: &Path) -> impl FnOnce(io::Error) -> InstallError + use<> {
    let path = path.to_owned();
    move |error| InstallError::Io { path, error }
}

/// What is kept where.
#[derive(Debug, Clone)]
pub struct Install {
    /// The program, as this process finds it.
    pub program: PathBuf,
    /// Where the runtime looks for plugins, as this process sees it; `None` leaves that to others.
    pub bin_dir: Option<PathBuf>,
    /// Where it looks for its configuration.
    pub conf_dir: PathBuf,
    pub entry: Entry,
}

impl Install {
    /// Puts plugin and entry where they belong, if they are not. Gives the list that has the entry.
    ///
    /// # Errors
    /// When that can't be done; what is there is whole then, and as it was.
    pub fn ensure(&self) -> Result<PathBuf, InstallError> {
        if let Some(folder) = &self.bin_dir {
            // Before the entry: a runtime that finds the entry must find the program.
            copy(&self.program, folder)?;
        }
        let (path, text) = network(&self.conf_dir)?.ok_or_else(|| InstallError::NoNetwork(self.conf_dir.clone()))?;
        let refused = |error| InstallError::List { path: path.clone(), error };
        if is_list(&path) {
            let merged = list::merge(&text, &self.entry).map_err(refused)?;
            if merged != text {
                replace(&path, &merged)?;
                tracing::info!(list = %path.display(), "The CNI list names heddle-cni now");
            }
            return Ok(path);
        }
        let name = path.file_name().and_then(OsStr::to_str).unwrap_or_default();
        let made = list::list_of(&text, name, &self.entry).map_err(refused)?;
        // Until its file is out of the way the single plugin goes on to be the one that the runtime takes.
        let into = path.with_extension("conflist");
        write_beside(&into, &made, Some(&path))?;
        let kept = kept(&path);
        fs::rename(&path, &kept).map_err(io_at(&path))?;
        tracing::info!(list = %into.display(), kept = %kept.display(), "A CNI list was made of a single plugin's file");
        Ok(into)
    }

    /// Keeps them there until `stopped`: looks when the configuration changes, and now and then. Tells each outcome that
    /// differs from the one before. Blocks.
    pub fn keep(&self, stopped: impl Fn() -> bool, mut tell: impl FnMut(&Result<PathBuf, InstallError>)) {
        let (wake, woken) = sync_channel(1);
        let on_event = move |event: notify::Result<notify::Event>| {
            // Reading is what this does itself.
            if !event.is_ok_and(|event| event.kind.is_access()) {
                let _already_woken = wake.try_send(());
            }
        };
        let mut watcher = notify::recommended_watcher(on_event).ok();
        let mut watched = false;
        let mut told = None;
        while !stopped() {
            watched = watched
                || watcher
                    .as_mut()
                    .is_some_and(|watcher| watcher.watch(&self.conf_dir, RecursiveMode::NonRecursive).is_ok());
            let outcome = self.ensure();
            let said = outcome.as_ref().map_err(ToString::to_string).cloned();
            if told.as_ref() != Some(&said) {
                tell(&outcome);
                told = Some(said);
            }
            let due = Instant::now() + limits::CNI_POLL;
            while !stopped() && Instant::now() < due {
                match woken.recv_timeout(limits::WATCH_INTERVAL) {
                    Ok(()) => {
                        std::thread::sleep(limits::CNI_QUIET);
                        break;
                    }
                    Err(RecvTimeoutError::Timeout) => {}
                    // Nothing is watched: the poll is what is left.
                    Err(RecvTimeoutError::Disconnected) => std::thread::sleep(limits::WATCH_INTERVAL),
                }
            }
        }
    }
}

/// Takes the entry out of every list of `conf_dir`, puts back what lists were made of, and removes the plugin from `bin_dir`. Gives what
/// was changed or removed; a folder that is not there has nothing.
///
/// # Errors
/// When something can't be taken away. Everything else is, and the plugin stays where an entry does: a runtime that finds the entry
/// must find the program.
pub fn remove(bin_dir: &Path, conf_dir: &Path) -> Result<Vec<PathBuf>, InstallError> {
    let mut changed = Vec::new();
    let mut first = Ok(());
    for path in files(conf_dir)? {
        match take_out(&path) {
            Ok(Some(path)) => changed.push(path),
            Ok(None) => {}
            Err(error) => first = first.and(Err(error)),
        }
    }
    first?;
    let program = bin_dir.join(PLUGIN);
    match fs::remove_file(&program) {
        Ok(()) => changed.push(program),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(io_at(&program)(error)),
    }
    Ok(changed)
}

fn take_out(path: &Path) -> Result<Option<PathBuf>, InstallError> {
    let text = read(path)?;
    // What is no list has no entry, whatever else it is.
    let Ok(Some(without)) = list::unmerge(&text) else { return Ok(None) };
    let Some(name) = list::made_from(&text).filter(|name| Path::new(name).file_name() == Some(OsStr::new(name))) else {
        replace(path, &without)?;
        return Ok(Some(path.to_owned()));
    };
    let single = path.with_file_name(name);
    let kept = kept(&single);
    let there = |path: &Path| path.try_exists().map_err(io_at(path));
    match (there(&single)?, there(&kept)?) {
        // The CNI has written it again: the newer one stays.
        (true, _) => {}
        (false, true) => fs::rename(&kept, &single).map_err(io_at(&kept))?,
        // What it was made of is lost, so the list stays, without the plugin.
        (false, false) => {
            replace(path, &without)?;
            return Ok(Some(path.to_owned()));
        }
    }
    fs::remove_file(path).map_err(io_at(path))?;
    if there(&kept)? {
        fs::remove_file(&kept).map_err(io_at(&kept))?;
    }
    Ok(Some(path.to_owned()))
}

/// Whether anything of heddle is in these folders: entries, files that were kept, the plugin.
///
/// # Errors
/// When the folders can't be read.
pub fn leftovers(bin_dir: &Path, conf_dir: &Path) -> Result<Vec<PathBuf>, InstallError> {
    let mut found = Vec::new();
    for path in files(conf_dir)? {
        if matches!(list::unmerge(&read(&path)?), Ok(Some(_))) {
            found.push(path);
        }
    }
    found.extend(entries(conf_dir)?.into_iter().filter(|path| path.to_string_lossy().ends_with(KEPT)));
    let program = bin_dir.join(PLUGIN);
    if program.try_exists().map_err(io_at(&program))? {
        found.push(program);
    }
    Ok(found)
}

/// Where a single plugin's file is kept.
fn kept(path: &Path) -> PathBuf {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(KEPT);
    path.with_file_name(name)
}

fn is_list(path: &Path) -> bool {
    path.extension() == Some(OsStr::new("conflist"))
}

/// The files that a runtime looks at, in its order.
fn files(folder: &Path) -> Result<Vec<PathBuf>, InstallError> {
    let known = |path: &PathBuf| {
        path.extension().and_then(OsStr::to_str).is_some_and(|ending| ["conf", "conflist", "json"].contains(&ending))
    };
    Ok(entries(folder)?.into_iter().filter(known).collect())
}

/// What is in a folder, by name; nothing in one that is not there.
fn entries(folder: &Path) -> Result<Vec<PathBuf>, InstallError> {
    let listed = match fs::read_dir(folder) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        listed => listed.map_err(io_at(folder))?,
    };
    let mut found = Vec::new();
    for entry in listed {
        if found.len() == limits::CNI_LISTS {
            return Err(InstallError::TooMany(folder.to_owned()));
        }
        found.push(entry.map_err(io_at(folder))?.path());
    }
    found.sort();
    Ok(found)
}

/// The file that the runtime takes, with its text; `None` where it would find none. One that can't be understood and comes before
/// the first that can is told of: the runtime passes it over, or breaks.
fn network(folder: &Path) -> Result<Option<(PathBuf, String)>, InstallError> {
    for path in files(folder)? {
        let text = read(&path)?;
        if list::is_network(&text, is_list(&path)) {
            return Ok(Some((path, text)));
        }
        tracing::warn!(file = %path.display(), "A file among the CNI configuration is no network: it is left alone");
    }
    Ok(None)
}

fn read(path: &Path) -> Result<String, InstallError> {
    let mut bytes = Vec::new();
    let file = File::open(path).map_err(io_at(path))?;
    file.take(limits::CNI_LIST + 1).read_to_end(&mut bytes).map_err(io_at(path))?;
    if bytes.len() as u64 > limits::CNI_LIST {
        return Err(InstallError::TooLarge(path.to_owned()));
    }
    // What is no text is no JSON either.
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

fn replace(path: &Path, text: &str) -> Result<(), InstallError> {
    write_beside(path, text, Some(path))
}

/// Writes a file whole, under its name only when it is complete, with mode and owner of `like`.
fn write_beside(path: &Path, text: &str, like: Option<&Path>) -> Result<(), InstallError> {
    place(path, &mut text.as_bytes(), |file| {
        let Some(like) = like else { return Ok(()) };
        let like = fs::metadata(like)?;
        fs::set_permissions(file, Permissions::from_mode(like.mode() & 0o7777))?;
        chown(file, Some(like.uid()), Some(like.gid()))
    })
}

/// Copies the program, if another is there or none.
fn copy(program: &Path, folder: &Path) -> Result<(), InstallError> {
    let into = folder.join(PLUGIN);
    if same(program, &into).map_err(io_at(program))? {
        return Ok(());
    }
    let mut from = File::open(program).map_err(io_at(program))?;
    place(&into, &mut from, |file| fs::set_permissions(file, Permissions::from_mode(0o755)))?;
    tracing::info!(program = %into.display(), "The CNI plugin is installed");
    Ok(())
}

/// Whether two files hold the same, and the second can be run.
fn same(one: &Path, other: &Path) -> io::Result<bool> {
    let Ok(there) = fs::metadata(other) else { return Ok(false) };
    if fs::metadata(one)?.len() != there.len() || there.mode() & 0o111 != 0o111 {
        return Ok(false);
    }
    let (mut one, mut other) = (io::BufReader::new(File::open(one)?), io::BufReader::new(File::open(other)?));
    let (mut left, mut right) = (vec![0; limits::CNI_COPY], vec![0; limits::CNI_COPY]);
    loop {
        let read = one.read(&mut left)?;
        if read == 0 {
            return Ok(true);
        }
        if other.read_exact(&mut right[..read]).is_err() || left[..read] != right[..read] {
            return Ok(false);
        }
    }
}

/// Writes a file beside its place, has it prepared, and moves it there.
fn place(path: &Path, from: &mut impl Read, prepare: impl FnOnce(&Path) -> io::Result<()>) -> Result<(), InstallError> {
    let name = path.file_name().and_then(OsStr::to_str).unwrap_or_default();
    // A runtime reads no hidden file without one of its endings.
    let beside = path.with_file_name(format!(".{name}.heddle-{}", std::process::id()));
    let written = (|| {
        let mut file = File::create(&beside)?;
        io::copy(from, &mut file)?;
        prepare(&beside)?;
        file.flush()?;
        file.sync_all()?;
        // Closed first: a program that is open for writing can't be run.
        drop(file);
        fs::rename(&beside, path)
    })();
    written.map_err(|error| {
        let _nothing_more_to_do = fs::remove_file(&beside);
        io_at(path)(error)
    })
}

#[cfg(test)]
mod tests;
