//! The families of many pods → one exposition: each family once, its samples together.
//!
//! Pure. Where pods say different things of one name, most pods' word holds (of as many, the first's), and who said otherwise
//! loses the description, never the others.

use std::collections::{BTreeMap, BTreeSet};

use super::exposition::{Family, Kind};

/// What the pods have in common of a name.
#[derive(Debug, Default)]
struct Merged<'a> {
    kind: Option<Kind>,
    help: &'a str,
    lines: Vec<&'a str>,
}

/// One exposition in the text format 0.0.4, and of each pod how many samples found no place in it.
pub fn merge(pods: &[Vec<Family>]) -> (String, Vec<usize>) {
    let kinds = agree(pods);
    // A histogram's `_count` belongs to it, whatever another pod calls so.
    let parts: BTreeSet<String> = kinds
        .iter()
        .flat_map(|(name, kind)| {
            kind.suffixes().iter().filter(|part| !part.is_empty()).map(move |part| format!("{name}{part}"))
        })
        .collect();
    let mut merged = BTreeMap::<String, Merged>::new();
    let mut dropped = vec![0; pods.len()];
    for (families, dropped) in pods.iter().zip(&mut dropped) {
        for family in families {
            let Some(kind) = kinds.get(family.name.as_str()).copied() else { continue };
            for sample in &family.samples {
                if kind.suffixes().contains(&sample.suffix) {
                    let into = merged.entry(family.name.clone()).or_default();
                    into.kind = Some(kind);
                    if into.help.is_empty() && family.kind == kind {
                        into.help = &family.help;
                    }
                    into.lines.push(&sample.line);
                    continue;
                }
                // Not as the others have it: by itself, if that name is free.
                let name = format!("{}{}", family.name, sample.suffix);
                if kinds.contains_key(name.as_str()) {
                    *dropped += 1;
                } else {
                    merged.entry(name).or_default().lines.push(&sample.line);
                }
            }
        }
    }
    (write(&merged, &parts), dropped)
}

/// The type of each name that a pod has a family of.
fn agree(pods: &[Vec<Family>]) -> BTreeMap<&str, Kind> {
    let mut votes = BTreeMap::<&str, Vec<(Kind, usize)>>::new();
    for family in pods.iter().flatten() {
        let votes = votes.entry(&family.name).or_default();
        match votes.iter_mut().find(|(kind, _)| *kind == family.kind) {
            Some((_, count)) => *count += 1,
            None => votes.push((family.kind, 1)),
        }
    }
    let most = |votes: Vec<(Kind, usize)>| {
        let most = votes.iter().map(|(_, count)| *count).max();
        votes.into_iter().find(|(_, count)| Some(*count) == most).map_or(Kind::Untyped, |(kind, _)| kind)
    };
    votes.into_iter().map(|(name, votes)| (name, most(votes))).collect()
}

fn write(merged: &BTreeMap<String, Merged>, parts: &BTreeSet<String>) -> String {
    let bytes = merged.values().flat_map(|family| &family.lines).map(|line| line.len() + 1).sum::<usize>();
    let mut text = String::with_capacity(bytes + 128 * merged.len());
    for (name, Merged { kind, help, lines }) in merged {
        // What is a part of another family has no description of its own.
        if let Some(kind) = kind.filter(|_| !parts.contains(name)) {
            if !help.is_empty() {
                text.push_str(&format!("# HELP {name} {help}\n"));
            }
            text.push_str(&format!("# TYPE {name} {}\n", kind.as_str()));
        }
        for line in lines {
            text.push_str(line);
            text.push('\n');
        }
    }
    text
}
