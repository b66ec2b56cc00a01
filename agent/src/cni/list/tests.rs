//! Lists as CNIs write them, and any JSON at all.

use proptest::prelude::*;

use super::*;

fn entry() -> Entry {
    Entry { socket: "/run/heddle/cni.sock".into(), state_dir: "/var/lib/heddle".into() }
}

fn types(text: &str) -> Vec<String> {
    let list: Value = serde_json::from_str(text).unwrap();
    let plugins = list["plugins"].as_array().unwrap();
    plugins.iter().map(|plugin| plugin["type"].as_str().unwrap().to_owned()).collect()
}

const BRIDGE: &str = r#"{
  "name": "net", "cniVersion": "1.0.0", "disableCheck": true,
  "plugins": [
    {"type": "bridge", "mtu": 1450, "ipam": {"type": "host-local", "ranges": [[{"subnet": "10.0.0.0/24"}]]}},
    {"type": "portmap", "capabilities": {"portMappings": true}}
  ]
}"#;

#[test]
fn the_plugin_comes_last_and_the_rest_stays() {
    let merged = merge(BRIDGE, &entry()).unwrap();
    assert_eq!(types(&merged), ["bridge", "portmap", PLUGIN]);
    let (before, mut after): (Value, Value) =
        (serde_json::from_str(BRIDGE).unwrap(), serde_json::from_str(&merged).unwrap());
    let ours = after["plugins"].as_array_mut().unwrap().pop().unwrap();
    assert_eq!(after, before);
    assert_eq!(ours, json!({"type": PLUGIN, "socket": "/run/heddle/cni.sock", "stateDir": "/var/lib/heddle"}));
}

#[test]
fn a_list_that_has_it_is_not_written_again_and_one_that_has_it_otherwise_is() {
    let merged = merge(BRIDGE, &entry()).unwrap();
    assert_eq!(merge(&merged, &entry()).unwrap(), merged);
    // In a layout of its own, which stays.
    let other = merged.replace("\n ", "\n    ");
    assert_eq!(merge(&other, &entry()).unwrap(), other);
    let moved = Entry { socket: "/elsewhere.sock".into(), ..entry() };
    assert_eq!(types(&merge(&merged, &moved).unwrap()), ["bridge", "portmap", PLUGIN]);
    // A CNI has put itself behind it, or it stands there twice.
    for behind in ["{\"type\": \"tuning\"}", "{\"type\": \"heddle-cni\"}"] {
        let mut list: Value = serde_json::from_str(&merged).unwrap();
        list["plugins"].as_array_mut().unwrap().push(serde_json::from_str(behind).unwrap());
        let mended = types(&merge(&list.to_string(), &entry()).unwrap());
        assert_eq!(mended.iter().filter(|name| *name == PLUGIN).count(), 1);
        assert_eq!(mended.last().unwrap(), PLUGIN);
    }
}

#[test]
fn what_was_merged_can_be_taken_out() {
    let merged = merge(BRIDGE, &entry()).unwrap();
    let without: Value = serde_json::from_str(&unmerge(&merged).unwrap().unwrap()).unwrap();
    assert_eq!(without, serde_json::from_str::<Value>(BRIDGE).unwrap());
    assert_eq!(unmerge(BRIDGE).unwrap(), None);
}

#[test]
fn a_single_plugin_becomes_a_list() {
    let single = r#"{"cniVersion": "0.3.1", "name": "net", "type": "ptp", "ipam": {"type": "dhcp"}}"#;
    let list = list_of(single, "10-ptp.conf", &entry()).unwrap();
    let value: Value = serde_json::from_str(&list).unwrap();
    assert_eq!((&value["cniVersion"], &value["name"]), (&json!("0.3.1"), &json!("net")));
    assert_eq!(value["plugins"][0], json!({"type": "ptp", "ipam": {"type": "dhcp"}}));
    assert_eq!(made_from(&list).as_deref(), Some("10-ptp.conf"));
    // Merged again, it is still known what it was made of.
    assert_eq!(merge(&list, &entry()).unwrap(), list);
    let moved = merge(&list, &Entry { socket: "/other".into(), ..entry() }).unwrap();
    assert_eq!(made_from(&moved).as_deref(), Some("10-ptp.conf"));
    assert_eq!(made_from(BRIDGE), None);
}

#[test]
fn what_is_no_cni_configuration_is_refused() {
    let reason = |text: &str| merge(text, &entry()).unwrap_err().reason();
    for text in ["", "{", "[]", "null", "\"x\"", "{} {}"] {
        assert_eq!(reason(text), "cni_list_json", "{text}");
    }
    for plugins in [
        "null",
        "{}",
        "[]",
        "[1]",
        "[{}]",
        "[{\"type\": 1}]",
        "[{\"type\": \"a\"}, {}]",
        "[{\"type\": \"heddle-cni\", \"a\": 1}]",
    ] {
        assert_eq!(
            reason(&format!("{{\"cniVersion\": \"1.0.0\", \"plugins\": {plugins}}}")),
            "cni_list_plugins",
            "{plugins}"
        );
    }
    for version in ["\"0.2.0\"", "\"7\"", "1", "null"] {
        let text = format!("{{\"cniVersion\": {version}, \"plugins\": [{{\"type\": \"a\"}}]}}");
        assert_eq!(reason(&text), "cni_list_version", "{version}");
    }
    assert_eq!(list_of("{\"cniVersion\": \"1.0.0\"}", "x", &entry()).unwrap_err().reason(), "cni_list_type");
    assert!(!is_network("{\"plugins\": []}", true) && !is_network("{}", false) && is_network(BRIDGE, true));
}

fn json() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        "[a-z\\PC]{0,8}".prop_map(Value::from),
    ];
    leaf.prop_recursive(3, 16, 4, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
            prop::collection::btree_map("[a-zA-Z]{1,6}", inner, 0..4)
                .prop_map(|map| Value::Object(map.into_iter().collect())),
        ]
    })
}

fn plugin() -> impl Strategy<Value = Value> {
    let name = prop_oneof![Just(PLUGIN.to_owned()), "[a-z]{1,8}"];
    (name, prop::collection::btree_map("[a-zA-Z]{1,6}", json(), 0..4)).prop_map(|(name, rest)| {
        let mut plugin: Map<String, Value> = rest.into_iter().collect();
        plugin.insert("type".into(), name.into());
        plugin.into()
    })
}

proptest! {
    #[test]
    fn any_list_keeps_what_is_others_in_its_order(
        before in prop::collection::vec(plugin(), 1..6),
        rest in prop::collection::btree_map("[a-m]{1,6}", json(), 0..4),
        version in prop::sample::select(VERSIONS.to_vec()),
    ) {
        let mut list: Map<String, Value> = rest.into_iter().collect();
        list.insert("cniVersion".into(), version.into());
        list.insert("plugins".into(), before.clone().into());
        let text = Value::Object(list.clone()).to_string();
        let others: Vec<_> = before.iter().filter(|plugin| plugin["type"] != PLUGIN).cloned().collect();
        match merge(&text, &entry()) {
            Err(error) => {
                prop_assert!(others.is_empty(), "{}", error);
            }
            Ok(merged) => {
                let value: Value = serde_json::from_str(&merged).unwrap();
                let after = value["plugins"].as_array().unwrap();
                prop_assert_eq!(&after[..after.len() - 1], &others[..]);
                prop_assert_eq!(&after[after.len() - 1]["type"], PLUGIN);
                prop_assert_eq!(merge(&merged, &entry()).unwrap(), merged.clone(), "merging is done once");
                // And out again: all of the rest is as it was.
                let out: Value = match unmerge(&merged).unwrap() {
                    Some(out) => serde_json::from_str(&out).unwrap(),
                    None => value.clone(),
                };
                list.insert("plugins".into(), others.into());
                prop_assert_eq!(out, Value::Object(list));
            }
        }
    }

    #[test]
    fn any_text_is_merged_or_refused(text in prop_oneof!["\\PC{0,64}", json().prop_map(|value| value.to_string())]) {
        let _ = merge(&text, &entry());
        let _ = unmerge(&text);
        let _ = list_of(&text, "x", &entry());
    }
}
