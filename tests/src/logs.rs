//! The agent's log and access log: JSON lines, with nested objects flattened to dotted keys.

use std::collections::BTreeMap;

use serde_json::Value;

/// One JSON line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Line(BTreeMap<String, String>);

impl Line {
    /// The value of a key such as `src.addr`; empty where it is absent.
    #[must_use]
    pub fn get(&self, key: &str) -> &str {
        self.0.get(key).map_or("", String::as_str)
    }

    #[must_use]
    pub fn number(&self, key: &str) -> Option<u64> {
        self.0.get(key)?.parse().ok()
    }

    /// Whether any value holds `text`.
    #[must_use]
    pub fn mentions(&self, text: &str) -> bool {
        self.0.values().any(|value| value.contains(text))
    }
}

/// Every JSON line of a text. Other lines are passed over.
#[must_use]
pub fn parse(text: &str) -> Vec<Line> {
    text.lines()
        .filter_map(|line| serde_json::from_str(line).ok())
        .map(|value: Value| {
            let mut flat = BTreeMap::new();
            flatten("", &value, &mut flat);
            Line(flat)
        })
        .collect()
}

fn flatten(path: &str, value: &Value, into: &mut BTreeMap<String, String>) {
    match value {
        Value::Object(members) => {
            for (key, member) in members {
                let path = if path.is_empty() { key.clone() } else { format!("{path}.{key}") };
                flatten(&path, member, into);
            }
        }
        Value::Null => {}
        Value::String(text) => {
            into.insert(path.to_owned(), text.clone());
        }
        other => {
            into.insert(path.to_owned(), other.to_string());
        }
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn nested_and_dotted_keys_read_the_same() {
        let lines = super::parse("{\"src\":{\"addr\":\"a\"},\"n\":3}\nnoise\n{\"src.addr\":\"b\"}\n");
        assert_eq!(lines[0].get("src.addr"), "a");
        assert_eq!(lines[0].number("n"), Some(3));
        assert_eq!(lines[1].get("src.addr"), "b");
    }
}
