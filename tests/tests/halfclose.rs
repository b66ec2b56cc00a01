//! Is what both ends meet, in any order of data, ends and resets, the same as without a mesh?

use std::{collections::BTreeMap, time::Duration};

use heddle_lab::{Lab, Pod, Result, needs_root, reports::Event, until};

/// Stories: each of them in plain TCP, through the tunnel, and in plain text into the mesh.
const STORIES: u64 = 2_000;

/// What both ends met, by story: client, server.
type Met = BTreeMap<u64, (String, String)>;

/// Tells the stories; a number is used for one way only, so that the server's answers can't be mixed up.
fn tell(client: &Pod, server: &Pod, way: u64) -> Result<Met> {
    let first = way << 32;
    let client = client.script(server.at(7000), first, STORIES).run()?;
    let told = until(Duration::from_secs(20), "the server's end of every story", || {
        let told: BTreeMap<u64, String> = server
            .events()
            .into_iter()
            .filter_map(|event| match event {
                Event::Told { seed, met } if seed >> 32 == way => Some((seed - first, met)),
                _ => None,
            })
            .collect();
        (told.len() as u64 == STORIES).then_some(told)
    });
    let told = told?;
    Ok(client
        .met
        .into_iter()
        .map(|(seed, met)| (seed - first, (met, told.get(&(seed - first)).cloned().unwrap_or_default())))
        .collect())
}

fn same(way: &str, met: &Met, plain: &Met) {
    let others: Vec<_> = met.iter().filter(|(story, met)| plain.get(story) != Some(met)).collect();
    println!("W3 {way}: {} of {STORIES} stories end as in plain TCP", plain.len() - others.len());
    for (story, met) in others.iter().take(10) {
        println!("  {story}: {met:?}\n   not {:?}", plain.get(story));
    }
    assert!(others.is_empty(), "{} stories differ", others.len());
}

#[test]
fn w3_ends_and_resets_in_any_order_look_as_without_a_mesh() -> Result {
    needs_root!();
    let lab = Lab::two_nodes()?;
    let server = lab.pod("shop", "server").on(2).serves(&["script:7000"]).outside_the_mesh().start()?;
    let client = lab.pod("shop", "client").outside_the_mesh().start()?;
    let plain = tell(&client, &server, 0)?;
    // The stories mean something: resets, ends and bytes are among them, and no end waited in vain.
    let all: String = plain.values().map(|(client, server)| format!("{client}|{server}\n")).collect();
    for word in ["reset", "end", "fin", "unread"] {
        assert!(all.contains(word), "{word}");
    }
    assert!(!all.contains("timeout") && !all.contains("wrong"), "{all}");
    server.enrol()?;
    same("plain text into the mesh", &tell(&client, &server, 1)?, &plain);
    client.enrol()?;
    same("through the tunnel", &tell(&client, &server, 2)?, &plain);
    assert!(lab.agent(1)?.opened(&[("connection_security_policy", "mutual_tls")])? >= 1_000.0, "they were tunnelled");
    Ok(())
}
