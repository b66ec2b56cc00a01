//! `heddle install`: prints the manifests of `deploy/`, with what an operator changes set in them.
//!
//! It writes nothing but stdout; the API server is asked only whether Istio's CRDs are there, which are never overwritten.

mod crds;
mod objects;
mod options;
mod patch;
#[cfg(test)]
mod tests;

use std::process::ExitCode;

use anyhow::Context;
use clap::Parser;

pub(super) use objects::{Object, parse, yaml};
pub(super) use options::Options;

use super::{Cli, ask::print};

/// `deploy/base`, file by file, in the order in which they are applied.
const BASE: [(&str, &str); 7] = [
    ("namespace/namespace.yaml", include_str!("../../../../deploy/namespace/namespace.yaml")),
    ("namespace/quota.yaml", include_str!("../../../../deploy/namespace/quota.yaml")),
    ("ca/rbac.yaml", include_str!("../../../../deploy/ca/rbac.yaml")),
    ("ca/network-policy.yaml", include_str!("../../../../deploy/ca/network-policy.yaml")),
    ("ca/ca.yaml", include_str!("../../../../deploy/ca/ca.yaml")),
    ("agent/rbac.yaml", include_str!("../../../../deploy/agent/rbac.yaml")),
    ("agent/daemonset.yaml", include_str!("../../../../deploy/agent/daemonset.yaml")),
];

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    #[command(flatten)]
    options: Options,
    #[command(flatten)]
    crds: crds::Choice,
}

impl Args {
    pub fn run(self) -> anyhow::Result<ExitCode> {
        let mut objects = manifests(&self.options)?;
        let crds = self.crds.wanted()?;
        for line in &crds.told {
            eprintln!("heddle install: {line}");
        }
        objects.splice(0..0, crds.objects);
        print(&yaml(&objects)?)?;
        Ok(ExitCode::SUCCESS)
    }
}

/// Everything but the CRDs, as configured, in the order in which it is applied.
///
/// # Errors
/// An option that can't work, by its flag.
pub(super) fn manifests(options: &Options) -> anyhow::Result<Vec<Object>> {
    let wanted = options.validate()?;
    let mut objects = Vec::new();
    for (file, text) in BASE {
        objects.extend(parse(text).with_context(|| format!("deploy/{file}"))?);
    }
    patch::apply(&mut objects, &wanted)?;
    for object in &objects {
        starts(object)?;
    }
    Ok(objects)
}

/// That the programs of a workload take the flags that it gives them.
fn starts(object: &Object) -> anyhow::Result<()> {
    let template = match object {
        Object::DaemonSet(daemon_set) => Some(&daemon_set.spec.template),
        Object::Deployment(deployment) => Some(&deployment.spec.template),
        _ => None,
    };
    let pods = template.and_then(|template| template.spec.as_ref()).into_iter();
    for container in pods.flat_map(|pod| &pod.containers) {
        let args = container.args.iter().flatten().cloned();
        let line = ["heddle".to_owned()].into_iter().chain(args);
        let cli = Cli::try_parse_from(line).with_context(|| object.described())?;
        cli.validate().with_context(|| object.described())?;
    }
    Ok(())
}
