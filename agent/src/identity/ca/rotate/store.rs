//! Where the key of a rotation is stored: a directory, or a Secret. A step's writes are ordered, so that one that was broken off can
//! be finished; to a Secret they go all at once, and not over what somebody else wrote meanwhile.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use k8s_openapi::{ByteString, api::core::v1::Secret};
use kube::{Api, Client, api::PostParams};
use zeroize::Zeroizing;

use super::{Held, NAMES, Write};
use crate::{
    identity::{
        ca::{publish::replace, secret::within, source::KEY},
        roots::read_capped,
    },
    life::limits,
};

/// A place that holds a signing key.
pub enum Store {
    Directory(PathBuf),
    Secret { client: Client, namespace: String, name: String },
}

/// Why it can't be read or written.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    #[error("can't read {0}: {1}")]
    Read(PathBuf, io::Error),
    #[error("can't write {0}: {1}")]
    Write(PathBuf, io::Error),
    #[error("Secret {0}: {1}")]
    Secret(String, kube::Error),
}

/// What was read, and what must not have changed until it is written.
pub(super) struct Stored {
    pub held: Held,
    /// Where it was one.
    secret: Secret,
}

impl Store {
    pub(super) async fn read(&self) -> Result<Stored, StoreError> {
        match self {
            Self::Directory(directory) => {
                let mut held = Held { place: directory.display().to_string(), ..Held::default() };
                for name in NAMES {
                    let path = directory.join(name);
                    match read_capped(&path, limits::BUNDLE_BYTES) {
                        Ok(bytes) => drop(held.parts.insert(name, Zeroizing::new(bytes))),
                        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                        Err(error) => return Err(StoreError::Read(path, error)),
                    }
                }
                Ok(Stored { held, secret: Secret::default() })
            }
            Self::Secret { client, namespace, name } => {
                let place = format!("{namespace}/{name}");
                let secret = within(Api::<Secret>::namespaced(client.clone(), namespace).get(name))
                    .await
                    .map_err(|error| StoreError::Secret(place.clone(), error))?;
                let mut held = Held { place: format!("Secret {place}"), ..Held::default() };
                for name in NAMES {
                    if let Some(bytes) = secret.data.as_ref().and_then(|data| data.get(name)) {
                        held.parts.insert(name, Zeroizing::new(bytes.0.clone()));
                    }
                }
                Ok(Stored { held, secret })
            }
        }
    }

    pub(super) async fn write(&self, stored: Stored, writes: Vec<Write>) -> Result<(), StoreError> {
        match self {
            Self::Directory(directory) => {
                for write in writes {
                    let path = directory.join(write.name);
                    put(directory, &path, &write).map_err(|error| StoreError::Write(path, error))?;
                }
                sync(directory).map_err(|error| StoreError::Write(directory.clone(), error))
            }
            Self::Secret { client, namespace, name } => {
                let mut secret = stored.secret;
                let data = secret.data.get_or_insert_default();
                for write in writes {
                    match write.bytes {
                        Some(bytes) => drop(data.insert(write.name.to_owned(), ByteString(bytes.to_vec()))),
                        None => drop(data.remove(write.name)),
                    }
                }
                // With the version that was read: a conflict is an error, and the step is given again.
                within(Api::<Secret>::namespaced(client.clone(), namespace).replace(
                    name,
                    &PostParams::default(),
                    &secret,
                ))
                .await
                .map(drop)
                .map_err(|error| StoreError::Secret(format!("{namespace}/{name}"), error))
            }
        }
    }
}

fn put(directory: &Path, path: &Path, write: &Write) -> io::Result<()> {
    let Some(bytes) = &write.bytes else {
        return match fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        };
    };
    // The CA's user reads the new key as it read the old one.
    let like = directory.join(KEY);
    replace(path, bytes, write.name.ends_with(".key").then_some(like.as_path()))
}

/// So that what was renamed stays renamed.
fn sync(directory: &Path) -> io::Result<()> {
    fs::File::open(directory)?.sync_all()
}
