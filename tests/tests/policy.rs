//! Is what a policy says what happens, before a byte reaches the app?

use std::time::{Duration, Instant};

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

/// A DENY for `street`, torn in the middle of being written.
const TORN: &str = "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata:\n  name: rule\n  \
    namespace: shop\nspec:\n  action: DENY\n  rules: [{from: [{sour";
const RULE: &str = "authorizationpolicy-shop-rule.yaml";

/// The workload is there before its policy, which comes torn and is whole 5 s later.
#[test]
fn o5_while_a_policy_is_not_readable_yet_nobody_gets_through_and_then_it_holds() -> Result {
    needs_root!();
    let stage = stage()?;
    let elsewhere = stage.lab.pod("street", "elsewhere").on(2).serves(&["echo:7000"]).start()?;
    stage.becomes("no policy", [true; 4])?;
    let (mut held, first) = stage.friend.hold(stage.server.at(7000), 3).open()?;
    assert_eq!(first.alive, 3);
    let agent = stage.lab.agent(2)?;
    stage.lab.manifests().put(RULE, TORN)?;
    agent.wait_log("Policies may be missing")?;
    let end = Instant::now() + Duration::from_secs(5);
    let mut tried = 0;
    while Instant::now() < end {
        assert_eq!(stage.passing()?, [false; 4], "after {tried} tries");
        tried += 4;
    }
    assert!(tried >= 8, "{tried} connections in 5 s");
    assert_eq!(held.check()?.alive, 3, "what was allowed before goes on");
    let seen = stage.outsider.connect(elsewhere.at(7000)).say("x").with("--expect", 1).run()?;
    assert_eq!(seen.error, None, "the file names shop, so other namespaces go on");
    let line = agent.wait_access("a refusal", |line| line.get("reason") == "policies_incomplete")?;
    assert!(line.mentions(RULE), "{line:?}");
    assert!(!agent.ready());
    assert!(agent.status()?["waiting_for"].to_string().contains(RULE), "{:#}", agent.status()?);
    assert_eq!(agent.metrics()?.sum("heddle_policy_gaps", &[]), 1.0);
    let rule = from(&json!({"namespaces": ["street"]}));
    stage.lab.authorize("shop", "rule", &json!({"action": "DENY", "rules": [rule]}))?;
    stage.becomes("DENY street", [true, false, false, true])?;
    until(Duration::from_secs(5), "a ready agent", || agent.ready().then_some(()))?;
    held.close()
}

/// The running agent goes on with what the file last said; a new one does not pretend.
#[test]
fn o7_a_malformed_deny_is_loud_and_the_last_good_state_holds_where_there_is_one() -> Result {
    needs_root!();
    let stage = stage()?;
    let rule = from(&json!({"namespaces": ["street"]}));
    let whole = json!({"action": "DENY", "rules": [rule]});
    stage.lab.authorize("shop", "rule", &whole)?;
    stage.becomes("DENY street", [true, false, false, true])?;
    stage.lab.manifests().put(RULE, TORN)?;
    let agent = stage.lab.agent(2)?;
    agent.wait_log(RULE)?;
    let told = |status: &Value| status["manifest_problems"].to_string().contains(RULE);
    until(Duration::from_secs(10), "the problem in heddle status", || told(&agent.status().ok()?).then_some(()))?;
    assert!(agent.status_text()?.stdout.contains(RULE));
    assert!(agent.metrics()?.sum("heddle_manifest_problems", &[]) >= 1.0);
    assert_eq!(stage.passing()?, [true, false, false, true], "the previous version is enforced");
    assert!(agent.ready());
    agent.daemon.terminate(Duration::from_secs(20))?;
    agent.daemon.spawn()?;
    stage.server.wait_captured()?;
    let status = agent.status()?;
    assert!(told(&status) && status["waiting_for"].to_string().contains(RULE), "{status:#}");
    assert!(!agent.ready(), "a new agent has no previous version");
    assert_eq!(stage.passing()?, [false; 4]);
    stage.lab.authorize("shop", "rule", &whole)?;
    stage.becomes("the DENY mended", [true, false, false, true])?;
    until(Duration::from_secs(10), "a ready agent", || agent.ready().then_some(()))
}

#[test]
fn a_policy_that_cant_be_enforced_denies_and_lint_says_so_before() -> Result {
    needs_root!();
    let stage = stage()?;
    let agent = stage.lab.agent(2)?;
    let folder = stage.lab.manifests().dir().display().to_string();
    assert_eq!(agent.heddle(&["policy", "lint", &folder])?.status.code(), Some(0));
    let rule = json!({"to": [{"operation": {"methods": ["GET"]}}]});
    stage.lab.authorize("shop", "rule", &json!({"action": "ALLOW", "rules": [rule]}))?;
    let linted = agent.heddle(&["policy", "lint", &folder])?;
    assert_eq!(linted.status.code(), Some(1), "{linted:?}");
    assert!(
        linted.stdout.contains("AuthorizationPolicy shop/rule: spec.rules[0].to[0].operation.methods: "),
        "{linted:?}"
    );
    stage.becomes("an unenforceable ALLOW", [false; 4])?;
    assert!(agent.status()?["policy_problems"].to_string().contains("shop/rule"));
    let malformed = json!({"action": "DENY", "ruels": [{}]});
    stage.lab.authorize("shop", "rule", &malformed)?;
    stage.becomes("an unknown field", [false; 4])?;
    agent.wait_access("the refusal", |line| {
        line.get("reason") == "policy_unenforceable" && line.get("policy") == "shop/rule"
    })?;
    stage.lab.manifests().put(RULE, "kind: [")?;
    assert_eq!(agent.heddle(&["policy", "lint", &folder])?.status.code(), Some(2));
    Ok(())
}

#[test]
fn an_explanation_says_what_happens() -> Result {
    needs_root!();
    let stage = stage()?;
    let agent = stage.lab.agent(2)?;
    let deny = from(&json!({"namespaces": ["street"], "ipBlocks": [format!("{}/32", stage.stranger.v4())]}));
    stage.lab.authorize("shop", "deny", &json!({"action": "DENY", "rules": [deny]}))?;
    stage.lab.authorize("shop", "allow", &json!({"rules": [from(&json!({"principals": ["*"]}))]}))?;
    stage.becomes("DENY one of street, ALLOW identities", [true, false, true, false])?;
    let folder = stage.lab.manifests().dir().display().to_string();
    let clients = [&stage.friend, &stage.stranger, &stage.near, &stage.outsider];
    for (client, passes) in clients.into_iter().zip([true, false, true, false]) {
        let identity = if client.name() == "outsider" { "none".to_owned() } else { client.identity() };
        let ip = client.v4().to_string();
        let question = ["policy", "explain", "--from", &identity, "--to", "shop/server:7000", "--ip", &ip];
        let (code, answer) = agent.ask_json(&question)?;
        assert_eq!((&answer["allowed"], code), (&json!(passes), Some(i32::from(!passes))), "{answer:#}");
        assert_eq!(answer["policies"].as_array().map(Vec::len), Some(2));
        let offline = agent.heddle(&[&question[..], &["--manifests", &folder, "--json"]].concat())?;
        assert_eq!(serde_json::from_str::<Value>(&offline.stdout)?, answer, "{offline:?}");
    }
    let text = agent.ask(&["policy", "explain", "--from", "street/near", "--to", "server:7000"])?.ok()?;
    assert!(text.contains("allowed: allowed by: shop/allow\n"), "{text}");
    assert!(text.contains("wants ") && text.contains("source.ipBlocks"), "{text}");
    Ok(())
}
