//! Is what a policy says what happens, before a byte reaches the app?

use std::time::Duration;

use heddle_lab::{Lab, Pod, Result, needs_root, until};
use serde_json::{Value, json};

/// A server on node 2 with two ports, and clients of two namespaces on both nodes.
struct Stage {
    lab: Lab,
    server: Pod,
    friend: Pod,
    stranger: Pod,
    near: Pod,
    outsider: Pod,
}

fn stage() -> Result<Stage> {
    let lab = Lab::two_nodes()?;
    Ok(Stage {
        server: lab.pod("shop", "server").on(2).serves(&["echo:7000", "echo:7001"]).start()?,
        friend: lab.pod("shop", "friend").start()?,
        stranger: lab.pod("street", "stranger").start()?,
        near: lab.pod("street", "near").on(2).start()?,
        outsider: lab.pod("street", "outsider").outside_the_mesh().start()?,
        lab,
    })
}

impl Stage {
    fn passes(&self, client: &Pod, port: u16) -> Result<bool> {
        let seen = client.connect(self.server.at(port)).say("hello").with("--expect", 5).run()?;
        assert!(seen.error.is_none() || seen.was_refused(), "neither through nor refused: {seen:?}");
        Ok(seen.error.is_none())
    }

    /// Who of friend, stranger, near and outsider gets through to port 7000.
    fn passing(&self) -> Result<[bool; 4]> {
        Ok([
            self.passes(&self.friend, 7000)?,
            self.passes(&self.stranger, 7000)?,
            self.passes(&self.near, 7000)?,
            self.passes(&self.outsider, 7000)?,
        ])
    }

    /// After the policy is in force, exactly these get through.
    fn becomes(&self, what: &str, wanted: [bool; 4]) -> Result {
        let mut last = None;
        until(Duration::from_secs(10), what, || {
            last = self.passing().ok();
            (last == Some(wanted)).then_some(())
        })
        .map_err(|error| error.context(format!("{what}: {last:?} is not {wanted:?}")))?;
        // And it stays so.
        assert_eq!(self.passing()?, wanted, "{what}");
        Ok(())
    }

    fn with_rule(&self, action: &str, rule: &Value, wanted: [bool; 4]) -> Result {
        self.lab.authorize("shop", "rule", &json!({"action": action, "rules": [rule]}))?;
        self.becomes(&format!("{action} {rule}"), wanted)?;
        self.lab.unauthorize("shop", "rule")?;
        self.becomes("no policy", [true; 4])
    }
}

fn from(source: &Value) -> Value {
    json!({"from": [{"source": source}]})
}

#[test]
fn principals_namespaces_and_service_accounts_decide() -> Result {
    needs_root!();
    let stage = stage()?;
    stage.becomes("no policy", [true; 4])?;
    stage.with_rule("ALLOW", &from(&json!({"principals": [stage.friend.principal()]})), [true, false, false, false])?;
    stage.with_rule("DENY", &from(&json!({"principals": [stage.friend.principal()]})), [false, true, true, true])?;
    stage.with_rule("ALLOW", &from(&json!({"namespaces": ["street"]})), [false, true, true, false])?;
    stage.with_rule("DENY", &from(&json!({"serviceAccounts": ["street/near"]})), [true, true, false, true])?;
    stage.with_rule("DENY", &from(&json!({"notNamespaces": ["shop"]})), [true, false, false, false])?;
    stage.with_rule("DENY", &from(&json!({"notPrincipals": ["*"]})), [true, true, true, false])
}

#[test]
fn address_blocks_decide() -> Result {
    needs_root!();
    let stage = stage()?;
    // Node 1's pods, then one address alone.
    stage.with_rule("DENY", &from(&json!({"ipBlocks": ["10.244.1.0/24"]})), [false, false, true, false])?;
    let stranger = stage.stranger.v4().to_string();
    stage.with_rule("ALLOW", &from(&json!({"ipBlocks": [stranger]})), [false, true, false, false])?;
    stage.with_rule("ALLOW", &from(&json!({"notIpBlocks": [stranger]})), [true, false, true, true])
}

#[test]
fn ports_decide() -> Result {
    needs_root!();
    let stage = stage()?;
    let rule = json!({"to": [{"operation": {"ports": ["7000"]}}]});
    stage.lab.authorize("shop", "rule", &json!({"action": "DENY", "rules": [rule]}))?;
    stage.becomes("DENY 7000", [false; 4])?;
    for client in [&stage.friend, &stage.stranger, &stage.near, &stage.outsider] {
        assert!(stage.passes(client, 7001)?, "{}", client.name());
    }
    Ok(())
}

#[test]
fn an_allow_policy_without_rules_denies_all_and_deny_wins() -> Result {
    needs_root!();
    let stage = stage()?;
    stage.lab.authorize("shop", "nothing", &json!({}))?;
    stage.becomes("spec: {}", [false; 4])?;
    stage.lab.authorize("shop", "all", &json!({"action": "ALLOW", "rules": [{}]}))?;
    stage.becomes("ALLOW all beside it", [true; 4])?;
    stage.lab.authorize(
        "shop",
        "not-you",
        &json!({"action": "DENY", "rules": [from(&json!({"namespaces": ["street"]}))]}),
    )?;
    stage.becomes("DENY beside both", [true, false, false, true])
}

#[test]
fn a_policy_change_closes_the_live_connections_that_it_denies_and_no_other() -> Result {
    needs_root!();
    let stage = stage()?;
    let holders = [&stage.friend, &stage.stranger, &stage.near, &stage.outsider];
    let mut held = Vec::new();
    for client in holders {
        let (holding, first) = client.hold(stage.server.at(7000), 5).with("--patience", 3_000).open()?;
        assert_eq!(first.alive, 5, "{}", client.name());
        held.push(holding);
    }
    let rule = from(&json!({"namespaces": ["street"]}));
    stage.lab.authorize("shop", "rule", &json!({"action": "DENY", "rules": [rule]}))?;
    stage.becomes("DENY street", [true, false, false, true])?;
    for (holding, (client, alive)) in held.iter_mut().zip(holders.into_iter().zip([5, 0, 0, 5])) {
        let now = holding.check()?;
        assert_eq!(now.alive, alive, "{}: {now:?}", client.name());
        assert!(!now.errors.contains_key("timeout"), "closed, not left hanging: {now:?}");
    }
    let line = stage.lab.agent(2)?.wait_access("a closed connection", |line| {
        line.get("src.identity") == stage.stranger.identity()
            && line.mentions("shop/rule")
            && !line.get("bytes_recv").is_empty()
    })?;
    assert!(line.mentions("policy change"), "{line:?}");
    Ok(())
}

#[test]
fn strict_refuses_plain_text_and_permissive_lets_it_in() -> Result {
    needs_root!();
    let stage = stage()?;
    stage.lab.require("shop", "default", &json!({"mtls": {"mode": "STRICT"}}))?;
    stage.becomes("STRICT", [true, true, true, false])?;
    let line = stage.lab.agent(2)?.wait_access("the refusal", |line| {
        line.get("src.addr").starts_with(&stage.outsider.v4().to_string()) && line.get("reason") == "mtls_required"
    })?;
    assert_eq!(line.get("policy"), "shop/default");
    stage.lab.require("shop", "default", &json!({"mtls": {"mode": "PERMISSIVE"}}))?;
    stage.becomes("PERMISSIVE", [true; 4])?;
    stage.lab.require(
        "shop",
        "default",
        &json!({
            "selector": {"matchLabels": {"app": "server"}},
            "mtls": {"mode": "STRICT"}, "portLevelMtls": {"7001": {"mode": "PERMISSIVE"}},
        }),
    )?;
    stage.becomes("STRICT but for 7001", [true, true, true, false])?;
    assert!(stage.passes(&stage.outsider, 7001)?);
    stage.lab.unrequire("shop", "default")?;
    stage.becomes("no PeerAuthentication", [true; 4])
}

#[test]
fn a_malformed_policy_file_leaves_the_last_good_state_in_force() -> Result {
    needs_root!();
    let stage = stage()?;
    let rule = from(&json!({"namespaces": ["street"]}));
    stage.lab.authorize("shop", "rule", &json!({"action": "DENY", "rules": [rule]}))?;
    stage.becomes("DENY street", [true, false, false, true])?;
    let file = "authorizationpolicy-shop-rule.yaml";
    stage
        .lab
        .manifests()
        .put(file, "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nspec: {action: [\n")?;
    stage.lab.agent(2)?.wait_log(file)?;
    assert_eq!(stage.passing()?, [true, false, false, true]);
    Ok(())
}
