//! `heddle uninstall manifests`: what takes heddle out of a cluster without stranding a pod: first the nodes are cleaned, by
//! what runs in the place of the agents and with their rights; then the objects go.

use std::process::ExitCode;

use anyhow::Context;
use clap::ValueEnum;
use k8s_openapi::{
    api::{
        apps::v1::{DaemonSetUpdateStrategy, RollingUpdateDaemonSet},
        core::v1::{ExecAction, Probe},
    },
    apimachinery::pkg::util::intstr::IntOrString,
};

use super::super::{
    ask::print,
    install::{self, Object, Options},
};

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Which step.
    #[arg(value_enum, value_name = "STEP")]
    step: Step,
    #[command(flatten)]
    options: Options,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Step {
    /// For `kubectl apply -f -`: each node is cleaned and then shows ready.
    Nodes,
    /// For `kubectl delete -f -`: everything that `heddle install` made. The CRDs stay, with the policies.
    Cluster,
}

impl Args {
    pub fn run(&self) -> anyhow::Result<ExitCode> {
        let mut objects = install::manifests(&self.options)?;
        match self.step {
            Step::Nodes => {
                objects.retain(|object| matches!(object, Object::DaemonSet(_)));
                for object in &mut objects {
                    clean_instead(object)?;
                }
            }
            Step::Cluster => {
                let namespace = &self.options.namespace;
                eprintln!("heddle uninstall: with namespace {namespace} goes Secret heddle-ca, the root of the mesh");
                objects.reverse();
            }
        }
        print(&install::yaml(&objects)?)?;
        Ok(ExitCode::SUCCESS)
    }
}

/// Makes of the agents' DaemonSet one that cleans: the same places of the node and the same rights, all nodes at once.
fn clean_instead(object: &mut Object) -> anyhow::Result<()> {
    let Object::DaemonSet(daemon_set) = object else { return Ok(()) };
    let spec = &mut daemon_set.spec;
    spec.update_strategy = Some(DaemonSetUpdateStrategy {
        type_: Some("RollingUpdate".to_owned()),
        rolling_update: Some(RollingUpdateDaemonSet {
            max_surge: Some(IntOrString::Int(0)),
            max_unavailable: Some(IntOrString::String("100%".to_owned())),
        }),
    });
    let containers = spec.template.spec.as_mut().map(|pod| &mut pod.containers);
    let container = containers.and_then(|all| all.first_mut()).context("deploy/agent: a pod without a container")?;
    let places = container.args.iter().flatten().filter(|arg| arg.starts_with("--cni-")).cloned();
    let places: Vec<String> = places.collect();
    let args = |last: &str| -> Vec<String> {
        ["uninstall".to_owned()].into_iter().chain(places.iter().cloned()).chain([last.to_owned()]).collect()
    };
    container.readiness_probe = Some(Probe {
        exec: Some(ExecAction { command: Some([vec!["/heddle".to_owned()], args("--verify")].concat()) }),
        period_seconds: Some(10),
        timeout_seconds: Some(30),
        ..Probe::default()
    });
    container.args = Some(args("--stay"));
    container.ports = None;
    Ok(())
}
