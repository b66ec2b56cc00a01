//! One line of Prometheus' text format (0.0.4): its name, labels and value.
//!
//! Pure, and one of its kind on purpose: the lab has this very file by path. Escapes, braces and commas within a label are the
//! format's own, and a rotation must not be mistaken about them.

use std::collections::BTreeMap;

/// One sample.
#[derive(Debug, Clone, PartialEq)]
pub struct Sample {
    pub name: String,
    pub labels: BTreeMap<String, String>,
    pub value: f64,
}

/// Reads a line; `None` for one that is no sample. A timestamp is passed over.
pub fn sample(line: &str) -> Option<Sample> {
    let end = line.find(['{', ' ', '\t'])?;
    let (name, rest) = line.split_at(end);
    if name.is_empty() || name.starts_with('#') {
        return None;
    }
    let (labels, rest) = match rest.strip_prefix('{') {
        Some(rest) => labels(rest)?,
        None => (BTreeMap::new(), rest),
    };
    let value = rest.split_ascii_whitespace().next()?.parse().ok()?;
    Some(Sample { name: name.to_owned(), labels, value })
}

/// What stands between the braces, and what comes after them.
fn labels(mut rest: &str) -> Option<(BTreeMap<String, String>, &str)> {
    let mut labels = BTreeMap::new();
    loop {
        rest = rest.trim_start_matches([',', ' ']);
        if let Some(after) = rest.strip_prefix('}') {
            return Some((labels, after));
        }
        let (name, after) = rest.split_once("=\"")?;
        let mut value = String::new();
        let mut letters = after.char_indices();
        let end = loop {
            match letters.next()? {
                (_, '\\') => value.push(match letters.next()?.1 {
                    'n' => '\n',
                    other => other,
                }),
                (at, '"') => break at,
                (_, letter) => value.push(letter),
            }
        };
        labels.insert(name.to_owned(), value);
        rest = after.get(end + 1..)?;
    }
}

#[cfg(test)]
mod tests {
    use super::sample;

    #[test]
    fn names_labels_and_values_are_read_whatever_stands_in_a_label() {
        let read =
            |line: &str| sample(line).map(|one| (one.name, one.labels.into_iter().collect::<Vec<_>>(), one.value));
        let label = |name: &str, value: &str| (name.to_owned(), value.to_owned());
        let hostile = "x{a=\"1\",b=\"q\\\"},c=\\\"\\\\ \\n=\",} 2 1700000000000";
        let wanted = vec![label("a", "1"), label("b", "q\"},c=\"\\ \n=")];
        assert_eq!(read(hostile), Some(("x".to_owned(), wanted, 2.0)));
        assert_eq!(read("y 4"), Some(("y".to_owned(), Vec::new(), 4.0)));
        assert_eq!(read("z{} +Inf"), Some(("z".to_owned(), Vec::new(), f64::INFINITY)));
        for none in
            ["", "# TYPE x counter", "#", "x", "x{a=\"1\"", "x{a=\"1} 1", "x{a=1} 1", "x{a=\"1\"}", "x{} one", " 1"]
        {
            assert_eq!(read(none), None, "{none:?}");
        }
    }
}
