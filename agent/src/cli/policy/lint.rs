//! `heddle policy lint`: reads manifests with the agent's own code and says what it would not enforce as written.

use std::{
    fmt::Write as _,
    io::Read,
    path::{Path, PathBuf},
    process::ExitCode,
    sync::Arc,
};

use serde::{Deserialize, Serialize};

use crate::{
    cli::{
        ask::{json, print},
        table::plain,
    },
    cluster::{self, Found, Manifest, ManifestError, Settings},
    life::{config::ROOT_NAMESPACE, limits},
    policy::Rulebook,
};

#[derive(Debug, clap::Args)]
pub(in crate::cli) struct Args {
    /// Manifest files, directories of them (as the agent reads them, without those below), or - for stdin.
    #[arg(required = true, value_name = "FILE")]
    files: Vec<PathBuf>,
    /// Namespace whose policies without a selector hold for the whole mesh.
    #[arg(long, env = "HEDDLE_ROOT_NAMESPACE", default_value = ROOT_NAMESPACE, value_name = "NAME")]
    root_namespace: String,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

/// What was looked at, and what is wrong with it. The JSON of `heddle policy lint --json`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Report {
    pub files: usize,
    pub policies: usize,
    pub problems: Vec<Finding>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Finding {
    pub file: String,
    /// Line on which the document starts, or of the error itself; `null` where nobody knows.
    pub line: Option<u64>,
    /// `Kind namespace/name`; empty where it is about the file.
    pub object: String,
    /// Path of the field; empty where it is about more than one.
    pub field: String,
    /// What is wrong and what to write instead.
    pub fix: String,
    pub effect: Effect,
}

/// What the agent does about it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Effect {
    Nothing,
    Denies,
    RefusesPlaintext,
    NotInForce,
    Unreadable,
}

impl Effect {
    fn text(self) -> &'static str {
        match self {
            Self::Nothing => "changes nothing",
            Self::Denies => "denies every connection to what it selects",
            Self::RefusesPlaintext => "refuses plaintext to what it selects",
            Self::NotInForce => "not in force",
            Self::Unreadable => "not read: connections are denied wherever it may have held a policy",
        }
    }

    fn status(self) -> u8 {
        match self {
            Self::Nothing => 0,
            Self::Denies | Self::RefusesPlaintext | Self::NotInForce => 1,
            Self::Unreadable => 2,
        }
    }
}

impl Args {
    pub fn run(self) -> anyhow::Result<ExitCode> {
        let settings = Settings { root_namespace: self.root_namespace.as_str().into(), ..Settings::default() };
        let report = lint(gather(&self.files), &settings);
        print(&if self.json { json(&report)? } else { text(&report) })?;
        Ok(ExitCode::from(report.status()))
    }
}

/// A file and its text.
pub(super) type Input = (PathBuf, Result<String, ManifestError>);

/// Every file that is meant, with directories spread out.
fn gather(paths: &[PathBuf]) -> Vec<Input> {
    let mut inputs = Vec::new();
    for path in paths {
        if path.as_os_str() == "-" {
            inputs.push((PathBuf::from("stdin"), stdin()));
        } else if path.is_dir() {
            match cluster::list(path) {
                Ok(files) => inputs.extend(files.into_iter().map(|file| {
                    let text = cluster::text(&file);
                    (file, text)
                })),
                Err(error) => inputs.push((path.clone(), Err(ManifestError::Unreadable(error.to_string())))),
            }
        } else {
            inputs.push((path.clone(), cluster::text(path)));
        }
    }
    inputs
}

fn stdin() -> Result<String, ManifestError> {
    let mut text = String::new();
    let read = std::io::stdin().lock().take(limits::MANIFEST_BYTES + 1).read_to_string(&mut text);
    match read {
        Err(error) => Err(ManifestError::Unreadable(error.to_string())),
        Ok(bytes) if bytes as u64 > limits::MANIFEST_BYTES => Err(ManifestError::TooLarge),
        Ok(_) => Ok(text),
    }
}

impl Report {
    /// The status to end with: the worst of all.
    pub fn status(&self) -> u8 {
        self.problems.iter().map(|finding| finding.effect.status()).max().unwrap_or_default()
    }
}

/// Everything that is wrong, file by file.
pub(super) fn lint(inputs: Vec<Input>, settings: &Settings) -> Report {
    let mut report = Report { files: inputs.len(), ..Report::default() };
    let mut read = Vec::with_capacity(inputs.len());
    for (file, text) in inputs {
        match text {
            Ok(text) => {
                let manifest = cluster::read(&text);
                report.policies += manifest.policies.len();
                let objects = report.add_file(&file, manifest, settings);
                read.push((file, objects));
            }
            Err(error) => report.problems.push(of_error(&file, &error)),
        }
    }
    let duplicates = cluster::duplicates(read.iter().map(|(file, objects)| (file.as_path(), &**objects)));
    report.problems.extend(duplicates.iter().map(|problem| {
        let ManifestError::Duplicate { other, .. } = &problem.error else {
            return of_error(&problem.file, &problem.error);
        };
        Finding {
            fix: format!("is also in {}: keep it in one place, as only one of them holds", other.display()),
            effect: Effect::NotInForce,
            ..of_error(&problem.file, &problem.error)
        }
    }));
    report
}

impl Report {
    fn add_file(&mut self, file: &Path, manifest: Manifest, settings: &Settings) -> Arc<cluster::Objects> {
        let Manifest { objects, errors, policies, foreign, .. } = manifest;
        let objects = Arc::new(objects);
        let snapshot = cluster::index(std::slice::from_ref(&objects), settings, 1);
        let rules = Rulebook::compile(&snapshot);
        let name = || file.display().to_string();
        let mut found: Vec<Finding> = errors.iter().map(|error| of_error(file, error)).collect();
        found.extend(rules.problems().iter().map(|problem| {
            let at = policies.iter().rfind(|at| at.kind == problem.kind && *at.name == *problem.policy);
            Finding {
                file: name(),
                line: at.map(|at| at.line),
                object: format!("{} {}", problem.kind.as_str(), problem.policy),
                field: problem.field.clone(),
                fix: problem.fix.clone(),
                effect: match problem.effect {
                    crate::policy::Effect::Denies => Effect::Denies,
                    crate::policy::Effect::RefusesPlaintext => Effect::RefusesPlaintext,
                    crate::policy::Effect::Nothing => Effect::Nothing,
                },
            }
        }));
        found.extend(foreign.iter().map(|Found { line, kind, name: object, api_version }| Finding {
            file: name(),
            line: Some(*line),
            object: format!("{} {object}", kind.as_str()),
            field: "apiVersion".into(),
            fix: format!("{api_version} is another project's: only security.istio.io is enforced here"),
            effect: Effect::Nothing,
        }));
        found.extend(snapshot.warnings.iter().map(|warning| Finding {
            file: name(),
            line: None,
            object: warning.object.clone(),
            field: warning.field.into(),
            fix: warning.message.clone(),
            effect: Effect::Nothing,
        }));
        found.sort_by_key(|finding| finding.line);
        self.problems.extend(found);
        objects
    }
}

fn of_error(file: &Path, error: &ManifestError) -> Finding {
    let what = match error {
        ManifestError::Object { message, .. } | ManifestError::Policy { message, .. } => message.clone(),
        ManifestError::Syntax { message, .. } => format!("not YAML: {message}"),
        other => other.to_string(),
    };
    Finding {
        file: file.display().to_string(),
        line: error.line(),
        object: error.object().unwrap_or_default().into(),
        field: error.field().unwrap_or_default().into(),
        fix: format!("{what}; {}", error.fix()),
        effect: Effect::Unreadable,
    }
}

pub(super) fn text(report: &Report) -> String {
    let mut text = String::new();
    for Finding { file, line, object, field, fix, effect } in &report.problems {
        let line = line.map(|line| format!(":{line}")).unwrap_or_default();
        let parts: Vec<String> =
            [object, field, fix].into_iter().filter(|part| !part.is_empty()).map(|part| plain(part)).collect();
        // Writing to memory can't fail.
        let _always_ok = writeln!(text, "{}{line}: {} ({})", plain(file), parts.join(": "), effect.text());
    }
    let (files, policies) = (counted(report.files, "file"), report.policies);
    let policies = if policies == 1 { "1 policy".to_owned() } else { format!("{policies} policies") };
    let problems = match report.problems.len() {
        0 => "no problem".to_owned(),
        count => counted(count, "problem"),
    };
    let _always_ok = writeln!(text, "{problems} in {files} with {policies}");
    text
}

fn counted(count: usize, what: &str) -> String {
    if count == 1 { format!("1 {what}") } else { format!("{count} {what}s") }
}
