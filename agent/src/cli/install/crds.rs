//! The CRDs of Istio's two policy kinds, made of our own types, for clusters without Istio. One that is there stays as it is:
//! it may be Istio's, with objects in it.

use std::{path::PathBuf, time::Duration};

use anyhow::Context;
use clap::ValueEnum;
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::{
    CustomResourceDefinition, CustomResourceSubresourceStatus, CustomResourceSubresources, JSONSchemaProps,
    JSONSchemaPropsOrArray, JSONSchemaPropsOrBool,
};
use kube::{Api, CustomResourceExt, ResourceExt};
use serde_json::json;

use super::{super::reach, objects::Object};
use crate::cluster::kinds::{AuthorizationPolicy, PeerAuthentication};

/// How long the API server may take to say whether a CRD is there.
const PATIENCE: Duration = Duration::from_secs(10);
/// Istio's objects are written in both, and are the same in both.
const OLDER: &str = "v1beta1";

#[derive(Debug, Clone, clap::Args)]
pub(super) struct Choice {
    /// The CRDs of AuthorizationPolicy and PeerAuthentication: those that the cluster lacks, all, or none. Without a
    /// kubeconfig nobody can tell what it lacks, and auto prints none.
    #[arg(long, value_enum, default_value = "auto", value_name = "WHICH")]
    crds: Which,
    /// The way to the cluster, for --crds=auto [default: as kubectl finds it].
    #[arg(long, value_name = "FILE")]
    kubeconfig: Option<PathBuf>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Which {
    Auto,
    Yes,
    No,
}

/// What is printed of them, and what is said of the others.
#[derive(Debug, Default)]
pub(super) struct Crds {
    pub objects: Vec<Object>,
    pub told: Vec<String>,
}

impl Choice {
    /// # Errors
    /// A kubeconfig that was named and can't be used. A cluster that can't be asked is told of, not an error.
    pub fn wanted(&self) -> anyhow::Result<Crds> {
        let all = || all().map(|crds| crds.into_iter().map(Object::from).collect::<Vec<_>>());
        match self.crds {
            Which::No => return Ok(Crds::default()),
            Which::Yes => return Ok(Crds { objects: all()?, told: Vec::new() }),
            Which::Auto => {}
        }
        let fix = "where the cluster has no Istio, say --crds=yes";
        let Some(config) = reach::Kubeconfig::find(self.kubeconfig.as_deref())? else {
            let told = vec![format!("no kubeconfig, so the CRDs of the two policy kinds are left out; {fix}")];
            return Ok(Crds { objects: Vec::new(), told });
        };
        let mut crds = Crds::default();
        for object in all()? {
            let name = object.metadata().name.clone().unwrap_or_default();
            match there(&config, &name) {
                Ok(true) => crds.told.push(format!("CRD {name} is there and stays as it is")),
                Ok(false) => crds.objects.push(object),
                Err(error) => crds.told.push(format!("CRD {name} is left out: {error:#}; {fix}")),
            }
        }
        Ok(crds)
    }
}

fn there(config: &reach::Kubeconfig, name: &str) -> anyhow::Result<bool> {
    config.ask(PATIENCE, async |client| {
        let api: Api<CustomResourceDefinition> = Api::all(client);
        Ok(api.get_metadata_opt(name).await?.is_some())
    })
}

/// Both, whether they are needed or not.
///
/// # Errors
/// Never in practice: only where a type's schema has not the expected form.
pub(super) fn all() -> anyhow::Result<Vec<CustomResourceDefinition>> {
    Ok(vec![complete(AuthorizationPolicy::crd(), "ap")?, complete(PeerAuthentication::crd(), "pa")?])
}

/// What the derived definition lacks: the status, the older version, the short names by which `kubectl` knows them.
fn complete(mut crd: CustomResourceDefinition, short: &str) -> anyhow::Result<CustomResourceDefinition> {
    let name = crd.name_any();
    crd.metadata.labels = Some([("app.kubernetes.io/name".to_owned(), "heddle".to_owned())].into());
    crd.spec.names.short_names = Some(vec![short.to_owned()]);
    crd.spec.names.categories = Some(vec!["istio-io".to_owned(), "security-istio-io".to_owned()]);
    let first = crd.spec.versions.first_mut().with_context(|| format!("{name} has no version"))?;
    first.subresources = Some(CustomResourceSubresources {
        status: Some(CustomResourceSubresourceStatus::default()),
        ..CustomResourceSubresources::default()
    });
    let schema = first.schema.as_mut().and_then(|schema| schema.open_api_v3_schema.as_mut());
    let properties = schema.and_then(|schema| schema.properties.as_mut());
    let properties = properties.with_context(|| format!("{name} has no schema"))?;
    properties.get_mut("spec").map(keep_unknown);
    properties.insert("status".to_owned(), status()?);
    let mut older = first.clone();
    OLDER.clone_into(&mut older.name);
    older.storage = false;
    crd.spec.versions.push(older);
    Ok(crd)
}

/// Has the API server keep fields that nobody knows. It would drop them, and what is left of a misspelt rule may be one that allows
/// everything; heddle denies for a field that it does not know, and says so in the policy's status.
fn keep_unknown(schema: &mut JSONSchemaProps) {
    for property in schema.properties.iter_mut().flat_map(|properties| properties.values_mut()) {
        keep_unknown(property);
    }
    if schema.properties.is_some() {
        schema.x_kubernetes_preserve_unknown_fields = Some(true);
    }
    if let Some(JSONSchemaPropsOrArray::Schema(items)) = &mut schema.items {
        keep_unknown(items);
    }
    if let Some(JSONSchemaPropsOrBool::Schema(values)) = &mut schema.additional_properties {
        keep_unknown(values);
    }
}

/// `status`: conditions as everywhere in Kubernetes, and whatever Istio puts beside them.
fn status() -> anyhow::Result<JSONSchemaProps> {
    let text = || json!({"type": "string"});
    Ok(serde_json::from_value(json!({
        "type": "object",
        "x-kubernetes-preserve-unknown-fields": true,
        "properties": {
            "observedGeneration": {"type": "integer", "format": "int64"},
            "conditions": {
                "type": "array",
                "items": {
                    "type": "object",
                    "x-kubernetes-preserve-unknown-fields": true,
                    "required": ["type", "status"],
                    "properties": {
                        "type": text(),
                        "status": text(),
                        "reason": text(),
                        "message": text(),
                        "lastTransitionTime": {"type": "string", "format": "date-time"},
                        "observedGeneration": {"type": "integer", "format": "int64"},
                    },
                },
            },
        },
    }))?)
}
