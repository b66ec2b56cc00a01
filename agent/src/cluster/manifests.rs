//! A directory of manifests as the source of truth: which files count, what each held when it was last good, and what is
//! wrong now.
//!
//! A malformed file changes nothing but the list of problems: its last good state stays in force. One that has none leaves a
//! gap where policies may be missing. No file may block the agent or grow it without bound.

use std::{
    collections::{BTreeMap, HashMap},
    fs::{self, File, Metadata, OpenOptions},
    io::{self, Read},
    os::unix::fs::{MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, SystemTime},
};

use super::{
    Objects, PolicyGap,
    read::{Manifest, read},
};
use crate::life::limits;

/// What is wrong with a manifest file.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ManifestError {
    #[error("can't be read: {0}")]
    Unreadable(String),
    #[error("is larger than {} bytes", limits::MANIFEST_BYTES)]
    TooLarge,
    #[error("the directory has {files} manifests, more than {}", limits::MANIFEST_FILES)]
    TooManyFiles { files: usize },
    #[error("line {line}: not YAML: {message}")]
    Syntax { line: u64, message: String },
    /// `line` is where the document starts.
    #[error("document at line {line}: {object}: {field}: {message}")]
    Object { line: u64, object: String, field: String, message: String },
    /// The policy is in force all the same: it denies.
    #[error("document at line {line}: {object}: {field}: {message}")]
    Policy { line: u64, object: String, field: String, message: String },
    #[error("{object} is also in {}, and this one holds", other.display())]
    Duplicate { object: String, other: PathBuf },
    /// Objects of this kind are those that were known last.
    #[error("{kind} can't be followed: {message}")]
    NotFollowed { kind: &'static str, message: String },
    /// `held` objects of it are in force all the same.
    #[error("{kind} of security.istio.io are no resource of this cluster ({held} known from before hold on for now)")]
    NoSuchKind { kind: &'static str, held: usize },
    #[error("there are more {kind} than the {} that the agent keeps: {count} are not known", limits::KUBE_OBJECTS)]
    TooManyObjects { kind: &'static str, count: usize },
    /// An object of the API server.
    #[error("{object}: {field}: {message}")]
    Served { object: String, field: String, message: String },
    /// The policy is in force all the same: it denies.
    #[error("{object}: {field}: {message}")]
    ServedPolicy { object: String, field: String, message: String },
    /// The last good snapshot on disk.
    #[error("{0}")]
    Saved(String),
}

impl ManifestError {
    /// Stable name: metric label and log key.
    #[must_use]
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Unreadable(_) => "manifest_unreadable",
            Self::TooLarge => "manifest_too_large",
            Self::TooManyFiles { .. } => "manifest_too_many_files",
            Self::Syntax { .. } => "manifest_syntax",
            Self::Object { .. } => "manifest_object",
            Self::Policy { .. } => "policy_invalid",
            Self::Duplicate { .. } => "manifest_duplicate",
            Self::NotFollowed { .. } => "not_followed",
            Self::NoSuchKind { .. } => "no_such_kind",
            Self::TooManyObjects { .. } => "too_many_objects",
            Self::Served { .. } => "object_invalid",
            Self::ServedPolicy { .. } => "policy_invalid",
            Self::Saved(_) => "snapshot_file",
        }
    }

    /// `Kind namespace/name` of the object at fault, where it is one.
    #[must_use]
    pub fn object(&self) -> Option<&str> {
        match self {
            Self::Object { object, .. }
            | Self::Policy { object, .. }
            | Self::Duplicate { object, .. }
            | Self::Served { object, .. }
            | Self::ServedPolicy { object, .. } => Some(object),
            _ => None,
        }
    }

    /// Path of the field at fault, where it is one.
    #[must_use]
    pub fn field(&self) -> Option<&str> {
        match self {
            Self::Object { field, .. }
            | Self::Policy { field, .. }
            | Self::Served { field, .. }
            | Self::ServedPolicy { field, .. } => Some(field),
            _ => None,
        }
    }

    /// Line (from 1), where it is known.
    #[must_use]
    pub fn line(&self) -> Option<u64> {
        match self {
            Self::Syntax { line, .. } | Self::Object { line, .. } | Self::Policy { line, .. } => Some(*line),
            _ => None,
        }
    }

    /// What to do about it.
    #[must_use]
    pub fn fix(&self) -> &'static str {
        match self {
            Self::Unreadable(_) => "make it a regular file that the agent may read",
            Self::TooLarge | Self::TooManyFiles { .. } => "spread the objects over other files, or fewer",
            Self::Syntax { .. } => "correct the YAML at that line",
            Self::Object { .. } | Self::Served { .. } => "correct the field, or take the object out",
            Self::NotFollowed { .. } => "see that the agent reaches the API server and may list and watch them",
            Self::NoSuchKind { .. } => "apply the CRDs of security.istio.io, which heddle install brings",
            Self::TooManyObjects { .. } => "remove objects that are of no use",
            Self::Saved(_) => "see that --state-dir can be written, and is this node's own",
            Self::Policy { .. } | Self::ServedPolicy { .. } => {
                "correct or remove the field: until then the policy denies where it holds"
            }
            Self::Duplicate { .. } => "keep the object in one file",
        }
    }
}

/// Something wrong in the directory, and what is in force meanwhile.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    pub file: PathBuf,
    pub error: ManifestError,
    pub in_force: InForce,
}

/// What counts while a file has a problem.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum InForce {
    /// The file as it was when it was last good.
    LastGood,
    /// There was no good state since the agent started: the objects of the file that are readable.
    Readable,
    /// The file as it is.
    Current,
}

/// What tells one state of a file from another without reading it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Stamp {
    device: u64,
    inode: u64,
    size: u64,
    modified: (i64, i64),
    changed: (i64, i64),
}

impl Stamp {
    fn of(metadata: &Metadata) -> Self {
        Self {
            device: metadata.dev(),
            inode: metadata.ino(),
            size: metadata.size(),
            modified: (metadata.mtime(), metadata.mtime_nsec()),
            changed: (metadata.ctime(), metadata.ctime_nsec()),
        }
    }

    /// Whether the file can't have changed since without a new stamp. File times are as coarse as a timer tick on most
    /// kernels, so one that changed just now may change once more and look the same.
    fn settled(&self) -> bool {
        const COARSE: Duration = Duration::from_millis(100);
        let seconds = u64::try_from(self.changed.0).unwrap_or_default();
        let age = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH + Duration::from_secs(seconds));
        // A time to come is of another clock, and no measure.
        age.map_or(true, |age| age > COARSE + Duration::from_secs(1))
    }
}

/// One file, as last read.
#[derive(Debug)]
struct Known {
    /// `None` makes the next scan read it again.
    stamp: Option<Stamp>,
    objects: Arc<Objects>,
    /// Whether `objects` are a whole, good state of the file.
    good: bool,
    problems: Vec<Problem>,
}

/// The directory and every file of it that was read.
#[derive(Debug)]
pub struct Directory {
    path: PathBuf,
    files: BTreeMap<PathBuf, Known>,
    /// What is wrong with the directory itself.
    problem: Option<Problem>,
    /// The gap that files leave which were too many to be read at the start.
    unread: Option<Arc<Objects>>,
}

impl Directory {
    pub fn new(path: PathBuf) -> Self {
        Self { path, files: BTreeMap::new(), problem: None, unread: None }
    }

    /// Looks at every file and reads those that changed. True if the objects or the problems may be others than before.
    ///
    /// # Errors
    /// When the directory itself can't be listed; then nothing changes.
    pub fn scan(&mut self) -> Result<bool, io::Error> {
        let listed = match list(&self.path) {
            Ok(listed) => listed,
            Err(error) => {
                self.problem = Some(self.of_directory(ManifestError::Unreadable(error.to_string())));
                return Err(error);
            }
        };
        let before = self.problem.take();
        if listed.len() > limits::MANIFEST_FILES {
            let problem = self.of_directory(ManifestError::TooManyFiles { files: listed.len() });
            let changed = before.as_ref() != Some(&problem);
            self.problem = Some(problem);
            // What is known stays; at the start there is nothing, and the first files by name are better than none.
            if !self.files.is_empty() {
                return Ok(changed);
            }
            self.unread = Some(Arc::new(with_gaps(Objects::default(), &self.path, vec![None])));
        } else {
            self.unread = None;
        }
        let mut changed = before != self.problem;
        let known = self.files.len();
        self.files.retain(|path, _| listed.binary_search(path).is_ok());
        changed |= self.files.len() != known;
        for path in listed.into_iter().take(limits::MANIFEST_FILES) {
            changed |= self.look_at(path);
        }
        Ok(changed)
    }

    fn of_directory(&self, error: ManifestError) -> Problem {
        Problem { file: self.path.clone(), error, in_force: InForce::LastGood }
    }

    /// Reads a file if it changed. True if its objects or problems may be others than before.
    fn look_at(&mut self, path: PathBuf) -> bool {
        let stamp = match fs::metadata(&path) {
            Ok(metadata) => Ok(Stamp::of(&metadata)),
            // A link whose target is gone, or a file that went since it was listed.
            Err(error) if error.kind() == io::ErrorKind::NotFound => return self.files.remove(&path).is_some(),
            Err(error) => Err(ManifestError::Unreadable(error.to_string())),
        };
        let known = self.files.get(&path);
        if let (Ok(stamp), Some(Known { stamp: Some(seen), .. })) = (&stamp, known)
            && stamp == seen
        {
            return false;
        }
        let (stamp, result) = match stamp {
            Ok(found) => match contents(&path) {
                Ok((stamp, text)) => (stamp.filter(Stamp::settled), Ok(read(&text))),
                // Tried again at every scan: nothing may tell when it becomes readable.
                Err(error @ ManifestError::Unreadable(_)) => (None, Err(error)),
                Err(error) => (Some(found).filter(Stamp::settled), Err(error)),
            },
            Err(error) => (None, Err(error)),
        };
        let (objects, errors, invalid, gaps) = match result {
            Ok(Manifest { objects, errors, invalid, gaps, .. }) => (Some(objects), errors, invalid, gaps),
            Err(error) => (None, vec![error], Vec::new(), vec![None]),
        };
        let (before, next) = match (self.files.remove(&path), objects) {
            (before, Some(objects)) if errors.is_empty() => {
                let problems = problems(&path, invalid, InForce::Current);
                (before, Known { stamp, objects: Arc::new(objects), good: true, problems })
            }
            (Some(before), _) if before.good => {
                let mut problems = problems(&path, errors, InForce::LastGood);
                problems.extend(before.problems.iter().filter(|problem| problem.in_force == InForce::Current).cloned());
                let objects = Arc::clone(&before.objects);
                (Some(before), Known { stamp, objects, good: true, problems })
            }
            (before, objects) => {
                let last = before.as_ref().map(|before| &before.objects);
                let objects = match (objects, last) {
                    // Nothing more is known than before, and it left its gap then.
                    (None, Some(last)) if last.policy_gaps.iter().any(|gap| gap.namespace.is_none()) => {
                        Arc::clone(last)
                    }
                    (objects, last) => {
                        let objects = objects.or_else(|| last.map(|last| Objects::clone(last))).unwrap_or_default();
                        Arc::new(with_gaps(objects, &path, gaps))
                    }
                };
                let mut problems = problems(&path, errors, InForce::Readable);
                problems.extend(self::problems(&path, invalid, InForce::Readable));
                (before, Known { stamp, objects, good: false, problems })
            }
        };
        let same = |before: &Known| Arc::ptr_eq(&before.objects, &next.objects) && before.problems == next.problems;
        let changed = !before.as_ref().is_some_and(same);
        self.files.insert(path, next);
        changed
    }

    /// The objects of every file, in the order of their names.
    pub fn objects(&self) -> Vec<Arc<Objects>> {
        self.files.values().map(|known| &known.objects).chain(&self.unread).cloned().collect()
    }

    /// Everything that is wrong, by file.
    pub fn problems(&self) -> Vec<Problem> {
        let of_files = self.files.values().flat_map(|known| known.problems.iter().cloned());
        self.problem.iter().cloned().chain(of_files).chain(self.duplicates()).collect()
    }

    fn duplicates(&self) -> Vec<Problem> {
        duplicates(self.files.iter().map(|(file, known)| (file.as_path(), &*known.objects)))
    }
}

/// Objects that are there more than once: the later one holds.
pub fn duplicates<'a>(files: impl Iterator<Item = (&'a Path, &'a Objects)>) -> Vec<Problem> {
    let mut seen: HashMap<(&str, &str, &str), &Path> = HashMap::new();
    let mut duplicates = Vec::new();
    for (file, objects) in files {
        for key @ (kind, namespace, name) in names(objects) {
            let Some(other) = seen.insert(key, file) else { continue };
            let separator = if namespace.is_empty() { "" } else { "/" };
            let object = format!("{kind} {namespace}{separator}{name}");
            let error = ManifestError::Duplicate { object, other: other.to_owned() };
            duplicates.push(Problem { file: file.to_owned(), error, in_force: InForce::Current });
        }
    }
    duplicates
}

/// Objects of a file, and where it may have held policies that are not among them.
fn with_gaps(mut objects: Objects, file: &Path, namespaces: Vec<Option<Arc<str>>>) -> Objects {
    let source: Arc<str> = file.to_string_lossy().into();
    let gap = |namespace| Arc::new(PolicyGap { source: Arc::clone(&source), namespace });
    objects.policy_gaps = namespaces.into_iter().map(gap).collect();
    objects.policy_gaps.dedup();
    objects
}

fn problems(file: &Path, errors: Vec<ManifestError>, in_force: InForce) -> Vec<Problem> {
    errors.into_iter().map(|error| Problem { file: file.to_owned(), error, in_force }).collect()
}

/// Kind, namespace and name of every object.
fn names(objects: &Objects) -> impl Iterator<Item = (&'static str, &str, &str)> {
    use super::index::{name_of, namespace_of};
    macro_rules! of {
        ($kind:literal, $field:ident) => {
            objects.$field.iter().map(|one| ($kind, namespace_of(&one.metadata), name_of(&one.metadata)))
        };
    }
    of!("Namespace", namespaces)
        .chain(of!("Node", nodes))
        .chain(of!("Pod", pods))
        .chain(of!("Service", services))
        .chain(of!("EndpointSlice", endpoint_slices))
        .chain(of!("AuthorizationPolicy", authorization_policies))
        .chain(of!("PeerAuthentication", peer_authentications))
        .chain(objects.invalid_policies.iter().map(|one| (one.kind.as_str(), &*one.namespace, &*one.name)))
}

/// Paths of the manifests in a directory, sorted. Hidden files and what editors leave behind don't count.
///
/// # Errors
/// When the directory can't be listed.
pub fn list(directory: &Path) -> Result<Vec<PathBuf>, io::Error> {
    let mut paths = Vec::new();
    for entry in fs::read_dir(directory)? {
        let entry = entry?;
        if is_manifest(&entry.file_name().to_string_lossy()) {
            paths.push(entry.path());
        }
    }
    paths.sort_unstable();
    Ok(paths)
}

/// Whether a file name is a manifest's. `x.yaml~`, `x.yaml.swp`, `#x.yaml#` end otherwise; `.#x.yaml` and `..data` are hidden.
fn is_manifest(name: &str) -> bool {
    let extension = name.rsplit_once('.').map(|(_, extension)| extension);
    matches!(extension, Some("yaml" | "yml" | "json")) && !name.starts_with(['.', '#', '~'])
}

/// A file's text.
///
/// # Errors
/// When it can't be read, is too large, or is no text.
pub fn text(path: &Path) -> Result<String, ManifestError> {
    contents(path).map(|(_, text)| text)
}

/// A file's text, with the stamp it had before and after reading; no stamp if it changed meanwhile.
fn contents(path: &Path) -> Result<(Option<Stamp>, String), ManifestError> {
    let unreadable = |error: io::Error| ManifestError::Unreadable(error.to_string());
    // Without O_NONBLOCK a FIFO would hold up every other file.
    let mut file: File = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(path).map_err(unreadable)?;
    let metadata = file.metadata().map_err(unreadable)?;
    if !metadata.is_file() {
        return Err(ManifestError::Unreadable("not a regular file".into()));
    }
    let mut bytes =
        Vec::with_capacity(usize::try_from(metadata.size().min(limits::MANIFEST_BYTES)).unwrap_or_default());
    file.by_ref().take(limits::MANIFEST_BYTES + 1).read_to_end(&mut bytes).map_err(unreadable)?;
    if bytes.len() as u64 > limits::MANIFEST_BYTES {
        return Err(ManifestError::TooLarge);
    }
    let text = String::from_utf8(bytes).map_err(|error| {
        let line = error.as_bytes()[..error.utf8_error().valid_up_to()].split(|b| *b == b'\n').count() as u64;
        ManifestError::Syntax { line, message: "not UTF-8".into() }
    })?;
    let before = Stamp::of(&metadata);
    let after = Stamp::of(&file.metadata().map_err(unreadable)?);
    Ok(((before == after).then_some(before), text))
}

#[cfg(test)]
mod tests;
