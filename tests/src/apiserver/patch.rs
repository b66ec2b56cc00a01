//! What a PATCH makes of an object: merge patch (RFC 7386), JSON patch (RFC 6902, as far as anybody here uses it), and
//! server-side apply of whole fields.

use serde_json::Value;

/// Applies a merge patch. Server-side apply of fields that one manager owns whole does the same.
pub fn merge(into: &mut Value, patch: &Value) {
    let Some(patch) = patch.as_object() else {
        into.clone_from(patch);
        return;
    };
    if !into.is_object() {
        *into = Value::Object(serde_json::Map::new());
    }
    let Some(fields) = into.as_object_mut() else { return };
    for (name, value) in patch {
        if value.is_null() {
            fields.remove(name);
        } else {
            merge(fields.entry(name.clone()).or_insert(Value::Null), value);
        }
    }
}

/// Applies a JSON patch of `add`, `remove`, `replace` and `test`.
///
/// # Errors
/// What can't be done, or is not so.
pub fn operations(into: &mut Value, patch: &Value) -> Result<(), String> {
    for operation in patch.as_array().ok_or("a JSON patch is a list")? {
        let text = |field: &str| operation[field].as_str().unwrap_or_default();
        let path = text("path");
        let (parent, last) = path.rsplit_once('/').ok_or_else(|| format!("{path:?} is no JSON pointer"))?;
        let last = last.replace("~1", "/").replace("~0", "~");
        if text("op") == "test" {
            if into.pointer(path).unwrap_or(&Value::Null) != &operation["value"] {
                return Err(format!("{path} is another than was tested for"));
            }
            continue;
        }
        let parent = into.pointer_mut(parent).ok_or_else(|| format!("{path} does not exist"))?;
        let value = operation["value"].clone();
        match (text("op"), parent) {
            ("add" | "replace", Value::Object(fields)) => {
                fields.insert(last, value);
            }
            ("remove", Value::Object(fields)) => {
                fields.remove(&last).ok_or_else(|| format!("{path} does not exist"))?;
            }
            ("add", Value::Array(items)) if last == "-" => items.push(value),
            (op, Value::Array(items)) => {
                let at: usize = last.parse().map_err(|_| format!("{path} is no place in a list"))?;
                match op {
                    "add" if at <= items.len() => items.insert(at, value),
                    "replace" if at < items.len() => items[at] = value,
                    "remove" if at < items.len() => drop(items.remove(at)),
                    _ => return Err(format!("{op} {path} can't be done")),
                }
            }
            (op, _) => return Err(format!("{op} {path} can't be done")),
        }
    }
    Ok(())
}
