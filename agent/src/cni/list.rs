//! The plugin's entry in a CNI list: put at its end, taken out again. Pure functions over the file's text.
//!
//! What is somebody else's stays as it is, but for the layout of the text. What is no CNI configuration is refused, never mended.

use serde_json::{Map, Value, json};

use super::{PLUGIN, plugin::VERSIONS};

/// What the plugin's entry says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Where the agent answers, as the runtime sees it.
    pub socket: String,
    /// Where it leaves what it knows, as the runtime sees it.
    pub state_dir: String,
}

impl Entry {
    fn value(&self, made_from: Option<&str>) -> Value {
        let mut entry = json!({ "type": PLUGIN, "socket": self.socket, "stateDir": self.state_dir });
        if let Some(name) = made_from {
            entry[MADE_FROM] = name.into();
        }
        entry
    }
}

/// In the entry of a list that was made of a single plugin's file: that file's name.
pub const MADE_FROM: &str = "madeFrom";

/// Why a file is left alone.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ListError {
    #[error("it is not JSON: {0}; mend the file")]
    Json(String),
    #[error("it is not a JSON object; mend the file")]
    NotAnObject,
    #[error("`plugins` is not a list of objects with a `type`, at least one; mend the file")]
    Plugins,
    #[error(
        "it has no `type`, so it is no plugin's configuration; mend the file, or name it .conflist if it is a list"
    )]
    NoType,
    #[error("its cniVersion {0:?} is older than chaining needs or not known: write one of {versions}", versions = VERSIONS.join(", "))]
    Version(String),
}

impl ListError {
    /// Stable name: metric label and log key.
    #[must_use]
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Json(_) | Self::NotAnObject => "cni_list_json",
            Self::Plugins => "cni_list_plugins",
            Self::NoType => "cni_list_type",
            Self::Version(_) => "cni_list_version",
        }
    }
}

/// The list with the plugin as its last, exactly once. A list that is so already comes back as it was, byte for byte.
///
/// # Errors
/// When the text is no CNI list, or of a version that knows no chaining.
pub fn merge(text: &str, entry: &Entry) -> Result<String, ListError> {
    let mut list = object(text)?;
    checked_version(&list)?;
    let plugins = plugins(&mut list)?;
    // Which file it was made of is to stay known.
    let made_from = plugins.iter().filter(|plugin| is_ours(plugin)).find_map(|plugin| plugin[MADE_FROM].as_str());
    let ours = entry.value(made_from);
    let others = plugins.iter().filter(|plugin| !is_ours(plugin)).count();
    if plugins.last() == Some(&ours) && others + 1 == plugins.len() {
        return Ok(text.to_owned());
    }
    if others == 0 {
        return Err(ListError::Plugins);
    }
    plugins.retain(|plugin| !is_ours(plugin));
    plugins.push(ours);
    Ok(written(&list))
}

/// The list without the plugin; `None` where it has no entry.
///
/// # Errors
/// When the text is no CNI list.
pub fn unmerge(text: &str) -> Result<Option<String>, ListError> {
    let mut list = object(text)?;
    let plugins = plugins(&mut list)?;
    let before = plugins.len();
    plugins.retain(|plugin| !is_ours(plugin));
    Ok((plugins.len() < before).then(|| written(&list)))
}

/// A list of what was a single plugin's configuration, in the file `name`, and the plugin behind it.
///
/// # Errors
/// When the text is no plugin's configuration, or of a version that knows no chaining.
pub fn list_of(text: &str, name: &str, entry: &Entry) -> Result<String, ListError> {
    let single = object(text)?;
    checked_version(&single)?;
    if !single.get("type").is_some_and(Value::is_string) {
        return Err(ListError::NoType);
    }
    if single.get("type").is_some_and(|name| name == PLUGIN) {
        return Err(ListError::Plugins);
    }
    let mut list = Map::new();
    for key in ["cniVersion", "name"] {
        if let Some(value) = single.get(key) {
            list.insert(key.to_owned(), value.clone());
        }
    }
    let only: Map<_, _> = single.into_iter().filter(|(key, _)| key != "cniVersion" && key != "name").collect();
    list.insert("plugins".to_owned(), json!([only, entry.value(Some(name))]));
    Ok(written(&list))
}

/// The file that a list was made of, by its entry.
#[must_use]
pub fn made_from(text: &str) -> Option<String> {
    let mut list = object(text).ok()?;
    let plugins = plugins(&mut list).ok()?;
    plugins.iter().filter(|plugin| is_ours(plugin)).find_map(|plugin| plugin[MADE_FROM].as_str().map(str::to_owned))
}

/// Whether a file of this text is one that a runtime takes for a network.
#[must_use]
pub fn is_network(text: &str, list: bool) -> bool {
    match object(text) {
        Ok(mut found) if list => plugins(&mut found).is_ok(),
        Ok(found) => found.get("type").is_some_and(Value::is_string),
        Err(_) => false,
    }
}

fn object(text: &str) -> Result<Map<String, Value>, ListError> {
    match serde_json::from_str(text) {
        Ok(Value::Object(object)) => Ok(object),
        Ok(_) => Err(ListError::NotAnObject),
        Err(error) => Err(ListError::Json(error.to_string())),
    }
}

fn checked_version(object: &Map<String, Value>) -> Result<(), ListError> {
    match object.get("cniVersion").and_then(Value::as_str).unwrap_or_default() {
        version if VERSIONS.contains(&version) => Ok(()),
        other => Err(ListError::Version(other.to_owned())),
    }
}

fn plugins(list: &mut Map<String, Value>) -> Result<&mut Vec<Value>, ListError> {
    match list.get_mut("plugins").and_then(Value::as_array_mut) {
        Some(plugins) if !plugins.is_empty() && plugins.iter().all(|plugin| plugin["type"].is_string()) => Ok(plugins),
        _ => Err(ListError::Plugins),
    }
}

fn is_ours(plugin: &Value) -> bool {
    plugin["type"] == PLUGIN
}

fn written(list: &Map<String, Value>) -> String {
    // Maps with text for keys can be written.
    let mut text = serde_json::to_string_pretty(list).unwrap_or_default();
    text.push('\n');
    text
}

#[cfg(test)]
mod tests;
