//! What the agents say at their `/metrics`: which roots they trust, of which root the certificates that they hold are, and which
//! roots their revocation lists need.
//!
//! An agent that can't be asked, or does not say it, is never taken to agree.

use rustls_pki_types::CertificateDer;

use super::{RootLine, ask::Answer, exposition::sample};
use crate::identity::{ca::root::describe, roots::span};

const TRUSTED: &str = "heddle_trust_root_expiry_timestamp_seconds";
const CERTIFICATES: &str = "heddle_certificate_expiry_timestamp_seconds";
const LISTS: &str = "heddle_crl_lists_of_one_root";

/// What one agent says.
pub(super) type Seen = Answer<Said>;

#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(super) struct Said {
    /// Serial numbers of the roots that it trusts.
    trusts: Vec<String>,
    /// Identity and root's serial number of the certificates that it holds; empty where it does not say.
    holds: Vec<(String, String)>,
    /// Serial numbers of roots that alone vouch for a revocation list.
    lists: Vec<String>,
}

/// Reads the three families out of the text exposition.
pub(super) fn said(text: &str) -> Result<Said, String> {
    let mut said = Said::default();
    for sample in text.lines().filter_map(sample) {
        let label = |name: &str| sample.labels.get(name).cloned();
        match sample.name.as_str() {
            TRUSTED => said.trusts.extend(label("serial")),
            CERTIFICATES => {
                said.holds.push((label("identity").unwrap_or_default(), label("root_serial").unwrap_or_default()));
            }
            LISTS if sample.value > 0.0 => said.lists.extend(label("root_serial")),
            _ => {}
        }
    }
    if said.trusts.is_empty() { Err("does not say which roots it trusts".to_owned()) } else { Ok(said) }
}

fn serial(root: &CertificateDer<'_>) -> String {
    span(root).map(|(serial, ..)| serial).unwrap_or_default()
}

/// Agents that are not known to trust this root, a line each.
pub(super) fn not_trusting(seen: &[Seen], root: Option<&CertificateDer<'static>>) -> Vec<String> {
    let Some(root) = root else { return vec!["it has no root".to_owned()] };
    let wanted = serial(root);
    seen.iter()
        .filter_map(|seen| match &seen.said {
            Ok(said) if said.trusts.contains(&wanted) => None,
            Ok(_) => Some(format!("agent {} does not trust {} yet", seen.who, describe(root))),
            Err(why) => Some(format!("agent {} {why}", seen.who)),
        })
        .collect()
}

/// Agents with a revocation list that could not be verified without this root, a line each: such an agent would refuse new mutual
/// TLS. Those that can't be asked are named by [`holding`].
pub(super) fn listing(seen: &[Seen], root: &CertificateDer<'static>) -> Vec<String> {
    let unwanted = serial(root);
    let has = |seen: &&Seen| seen.said.as_ref().is_ok_and(|said| said.lists.contains(&unwanted));
    let line = |seen: &Seen| {
        format!(
            "agent {} has a revocation list (--crl) that can't be verified without {}; take it out of the file once all that it \
             revokes has expired",
            seen.who,
            describe(root)
        )
    };
    seen.iter().filter(has).map(line).collect()
}

/// Agents that hold certificates of this root, or are not known to hold none, a line each.
pub(super) fn holding(seen: &[Seen], root: &CertificateDer<'static>) -> Vec<String> {
    let unwanted = serial(root);
    let line = |seen: &Seen| match &seen.said {
        Err(why) => Some(format!("agent {} {why}", seen.who)),
        Ok(said) => {
            let silent = said.holds.iter().filter(|(_, root)| root.is_empty()).count();
            let mut held = said.holds.iter().filter(|(_, root)| *root == unwanted);
            match (held.next(), held.count()) {
                (Some((first, _)), more) => Some(format!(
                    "agent {} holds {} of {}, such as that of {first}; they are renewed at half of their life",
                    seen.who,
                    certificates(more + 1),
                    describe(root)
                )),
                (None, _) if silent > 0 => {
                    Some(format!("agent {} does not say of which root {} are", seen.who, certificates(silent)))
                }
                (None, _) => None,
            }
        }
    };
    seen.iter().filter_map(line).collect()
}

fn certificates(count: usize) -> String {
    if count == 1 { "1 certificate".to_owned() } else { format!("{count} certificates") }
}

impl Seen {
    /// For the status: what it trusts and holds of these roots.
    pub fn line(&self, roots: &[RootLine]) -> String {
        let said = match &self.said {
            Ok(said) => said,
            Err(why) => return why.clone(),
        };
        let of = |root: &RootLine| {
            let trusted = if said.trusts.contains(&root.serial) { "trusted" } else { "not trusted" };
            let held = said.holds.iter().filter(|(_, serial)| *serial == root.serial).count();
            format!("{} {trusted}, {} held", root.role, certificates(held))
        };
        roots.iter().map(of).collect::<Vec<_>>().join("; ")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::identity::tests::support::TestRoot;

    fn seen(text: &str) -> Vec<Seen> {
        vec![Answer { who: "a".to_owned(), said: said(text) }]
    }

    #[test]
    fn an_agent_that_does_not_say_it_never_agrees() {
        let root = TestRoot::new("a root").certificate.der().clone();
        let serial = serial(&root);
        let trusts = format!("{TRUSTED}{{subject=\"CN=\\\"x}}\",serial=\"{serial}\"}} 1900000000\n");
        let held =
            |root: &str| format!("{trusts}{CERTIFICATES}{{identity=\"i\",serial=\"1\",root_serial=\"{root}\"}} 9\n");
        assert_eq!(not_trusting(&seen(&trusts), Some(&root)), Vec::<String>::new());
        for text in ["", "# nothing\n", &format!("{TRUSTED}{{serial=\"00\"}} 1\n"), &format!("x{trusts}")] {
            assert_eq!(not_trusting(&seen(text), Some(&root)).len(), 1, "{text}");
        }
        assert_eq!(holding(&seen(&held("00")), &root), Vec::<String>::new());
        for text in [held(&serial), held(""), format!("{trusts}{CERTIFICATES}{{identity=\"i\"}} 9\n"), String::new()] {
            assert_eq!(holding(&seen(&text), &root).len(), 1, "{text}");
        }
        let list = |root: &str| format!("{trusts}{LISTS}{{root_serial=\"{root}\"}} 1\n");
        assert_eq!(listing(&seen(&list("00")), &root), Vec::<String>::new());
        assert_eq!(listing(&seen(&list(&serial)), &root).len(), 1);
        let away = vec![Answer { who: "a".to_owned(), said: Err("can't be asked".to_owned()) }];
        assert_eq!(not_trusting(&away, Some(&root)).len(), 1);
        assert_eq!(holding(&away, &root).len(), 1);
    }
}
