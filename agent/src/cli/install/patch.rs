//! What the options change in the objects of `deploy/base`: fields of typed objects, never text.

use std::collections::BTreeMap;

use anyhow::Context;
use clap::ValueEnum;
use k8s_openapi::{
    api::{
        apps::v1::DaemonSet,
        core::v1::{
            ConfigMapVolumeSource, Container, HostPathVolumeSource, KeyToPath, LocalObjectReference, PodSpec,
            ResourceRequirements, SecretVolumeSource, Volume, VolumeMount,
        },
        rbac::v1::{PolicyRule, Subject},
    },
    apimachinery::pkg::api::resource::Quantity,
};

use super::{
    objects::Object,
    options::{AUDIENCE, CLUSTER_ID, CNI_BIN_DIR, CNI_CONF_DIR, CaWanted, Options, SameNode, Wanted},
};
use crate::life::config::{ROOT_NAMESPACE, TRUST_DOMAIN};

const COMPONENT: &str = "app.kubernetes.io/component";
/// Where the CA's pod finds an intermediate of `--ca=secret`.
const CA_KEY: &str = "/etc/heddle/ca-key";
/// The file that the agents trust, whatever its ConfigMap calls it.
const ROOT_FILE: &str = "root-cert.pem";

/// Brings the objects into the wanted form.
///
/// # Errors
/// Where `deploy/` lacks what is to be changed.
pub(super) fn apply(objects: &mut Vec<Object>, wanted: &Wanted) -> anyhow::Result<()> {
    let options = &wanted.options;
    if let CaWanted::External { .. } = wanted.ca {
        let of_ca = |object: &Object| {
            let labels = object.metadata().labels.as_ref();
            labels.and_then(|labels| labels.get(COMPONENT)).is_some_and(|component| component == "ca")
        };
        objects.retain(|object| !of_ca(object));
    }
    for object in &mut *objects {
        place(object, &options.namespace);
        match object {
            Object::DaemonSet(daemon_set) => agent(daemon_set, wanted)?,
            Object::Deployment(deployment) => {
                let spec = deployment.spec.template.spec.as_mut();
                ca(spec.context("deploy/ca: the Deployment has no pods")?, wanted)?;
            }
            Object::ClusterRole(role) if options.taint && role.metadata.name.as_deref() == Some("heddle-agent") => {
                role.rules.get_or_insert_default().push(PolicyRule {
                    api_groups: Some(vec![String::new()]),
                    resources: Some(vec!["nodes".to_owned()]),
                    verbs: vec!["get".to_owned(), "patch".to_owned()],
                    ..PolicyRule::default()
                });
            }
            _ => {}
        }
    }
    Ok(())
}

/// Moves an object, and those whom it names, into the namespace.
fn place(object: &mut Object, namespace: &str) {
    let metadata = object.metadata_mut();
    if let Some(own) = &mut metadata.namespace {
        namespace.clone_into(own);
    }
    let subjects: &mut Option<Vec<Subject>> = match object {
        Object::Namespace(own) => return own.metadata.name = Some(namespace.to_owned()),
        Object::RoleBinding(binding) => &mut binding.subjects,
        Object::ClusterRoleBinding(binding) => &mut binding.subjects,
        _ => return,
    };
    for subject in subjects.iter_mut().flatten() {
        subject.namespace = Some(namespace.to_owned());
    }
}

/// What both pods have in common; gives the one container.
fn pod<'a>(spec: &'a mut PodSpec, options: &Options) -> anyhow::Result<&'a mut Container> {
    let secrets = options.image_pull_secret.iter().map(|name| LocalObjectReference { name: name.clone() });
    if !options.image_pull_secret.is_empty() {
        spec.image_pull_secrets = Some(secrets.collect());
    }
    let container = spec.containers.first_mut().context("deploy/: a pod without a container")?;
    container.image = Some(options.image.clone());
    let args = container.args.get_or_insert_default();
    set_unless(args, "--trust-domain", &options.trust_domain, TRUST_DOMAIN);
    set_unless(args, "--cluster-id", &options.cluster_id, CLUSTER_ID);
    let format = options.log_format.to_possible_value().context("a log format without a name")?;
    set(args, "--log-format", format.get_name());
    Ok(container)
}

fn agent(daemon_set: &mut DaemonSet, wanted: &Wanted) -> anyhow::Result<()> {
    let options = &wanted.options;
    let spec = daemon_set.spec.template.spec.as_mut();
    let spec = spec.context("deploy/agent: the DaemonSet has no pods")?;
    let container = pod(spec, options)?;
    let args = container.args.get_or_insert_default();
    set_unless(args, "--root-namespace", &options.namespace, ROOT_NAMESPACE);
    if options.namespace != ROOT_NAMESPACE {
        set(args, "--ca-address", &format!("https://heddle-ca.{}.svc:15012", options.namespace));
    }
    if options.same_node == SameNode::Mtls {
        set(args, "--same-node", "mtls");
    }
    if options.taint {
        args.push("--startup-taint".to_owned());
    }
    if let CaWanted::External { address, .. } = &wanted.ca {
        set(args, "--ca-address", address);
    }
    if options.no_cni {
        args.retain(|arg| !arg.starts_with("--cni-"));
        let mounts = container.volume_mounts.get_or_insert_default();
        mounts.retain(|mount| !mount.name.starts_with("cni-"));
    }
    container.args.get_or_insert_default().extend(options.agent_arg.iter().cloned());
    resources(container.resources.get_or_insert_default(), options);

    let volumes = spec.volumes.get_or_insert_default();
    if options.no_cni {
        volumes.retain(|volume| !volume.name.starts_with("cni-"));
    }
    for volume in volumes {
        match volume.name.as_str() {
            "cni-bin" => relocate(volume, &options.cni_bin_dir.to_string_lossy(), CNI_BIN_DIR),
            "cni-conf" => relocate(volume, &options.cni_conf_dir.to_string_lossy(), CNI_CONF_DIR),
            "ca-root" => {
                if let CaWanted::External { config_map, key, .. } = &wanted.ca {
                    let renamed = KeyToPath { key: key.clone(), path: ROOT_FILE.to_owned(), ..KeyToPath::default() };
                    volume.config_map = Some(ConfigMapVolumeSource {
                        name: config_map.clone(),
                        optional: Some(true),
                        items: (key != ROOT_FILE).then(|| vec![renamed]),
                        ..ConfigMapVolumeSource::default()
                    });
                }
            }
            "token" if options.ca_audience != AUDIENCE => {
                let sources = volume.projected.iter_mut().flat_map(|projected| &mut projected.sources).flatten();
                for token in sources.filter_map(|source| source.service_account_token.as_mut()) {
                    token.audience = Some(options.ca_audience.clone());
                }
            }
            _ => {}
        }
    }
    Ok(())
}

fn ca(spec: &mut PodSpec, wanted: &Wanted) -> anyhow::Result<()> {
    let options = &wanted.options;
    let container = pod(spec, options)?;
    let args = container.args.get_or_insert_default();
    if options.namespace != ROOT_NAMESPACE {
        let namespace = &options.namespace;
        set(args, "--root-secret", &format!("{namespace}/heddle-ca"));
        set(args, "--name", &format!("heddle-ca.{namespace}.svc"));
        set(args, "--agent-service-account", &format!("{namespace}/heddle-agent"));
    }
    set_unless(args, "--token-audience", &options.ca_audience, AUDIENCE);
    if let CaWanted::Secret { name } = &wanted.ca {
        args.retain(|arg| !is(arg, "--root-secret"));
        set(args, "--root-dir", CA_KEY);
        container.volume_mounts.get_or_insert_default().push(VolumeMount {
            name: "ca-key".to_owned(),
            mount_path: CA_KEY.to_owned(),
            read_only: Some(true),
            ..VolumeMount::default()
        });
        spec.volumes.get_or_insert_default().push(Volume {
            name: "ca-key".to_owned(),
            secret: Some(SecretVolumeSource { secret_name: Some(name.clone()), ..SecretVolumeSource::default() }),
            ..Volume::default()
        });
    }
    Ok(())
}

fn relocate(volume: &mut Volume, path: &str, usual: &str) {
    if path == usual {
        return;
    }
    let kind = volume.host_path.as_ref().and_then(|path| path.type_.clone());
    volume.host_path = Some(HostPathVolumeSource { path: path.to_owned(), type_: kind });
}

fn resources(resources: &mut ResourceRequirements, options: &Options) {
    let put = |place: &mut Option<BTreeMap<String, Quantity>>, name: &str, value: &Option<String>| {
        if let Some(value) = value {
            place.get_or_insert_default().insert(name.to_owned(), Quantity(value.clone()));
        }
    };
    put(&mut resources.requests, "cpu", &options.cpu);
    put(&mut resources.requests, "memory", &options.memory);
    put(&mut resources.limits, "cpu", &options.cpu_limit);
    put(&mut resources.limits, "memory", &options.memory_limit);
}

/// Whether `arg` is this flag, with or without a value.
fn is(arg: &str, flag: &str) -> bool {
    arg.strip_prefix(flag).is_some_and(|rest| rest.is_empty() || rest.starts_with('='))
}

/// `--flag=value`, in the place of what the flag was.
fn set(args: &mut Vec<String>, flag: &str, value: &str) {
    let wanted = format!("{flag}={value}");
    match args.iter_mut().find(|arg| is(arg, flag)) {
        Some(arg) => *arg = wanted,
        None => args.push(wanted),
    }
}

/// The same, where it says something else than the program's own default.
fn set_unless(args: &mut Vec<String>, flag: &str, value: &str, default: &str) {
    if value != default {
        set(args, flag, value);
    }
}
