//! A scrape of `/metrics`, parsed: samples by name and labels.

use std::collections::BTreeMap;

/// One line of the text exposition.
#[derive(Debug, Clone, PartialEq)]
pub struct Sample {
    pub name: String,
    pub labels: BTreeMap<String, String>,
    pub value: f64,
}

/// Everything of one scrape.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Scrape(pub Vec<Sample>);

impl Scrape {
    /// Parses the Prometheus text format; lines that are no samples are passed over.
    #[must_use]
    pub fn parse(text: &str) -> Self {
        Self(text.lines().filter_map(sample).collect())
    }

    /// Samples of a metric that carry all of these labels.
    pub fn with<'a>(
        &'a self,
        name: &'a str,
        labels: &'a [(&'a str, &'a str)],
    ) -> impl Iterator<Item = &'a Sample> + 'a {
        self.0.iter().filter(move |sample| {
            sample.name == name
                && labels.iter().all(|(key, value)| sample.labels.get(*key).is_some_and(|found| found == value))
        })
    }

    /// Their sum; 0 where there is none.
    #[must_use]
    pub fn sum(&self, name: &str, labels: &[(&str, &str)]) -> f64 {
        // Not sum(): of nothing that is -0.
        self.with(name, labels).fold(0.0, |sum, sample| sum + sample.value)
    }

    /// Whether the metric is there at all.
    #[must_use]
    pub fn has(&self, name: &str) -> bool {
        self.0.iter().any(|sample| sample.name == name)
    }
}

fn sample(line: &str) -> Option<Sample> {
    if line.starts_with('#') {
        return None;
    }
    let (head, value) = match line.rfind('}') {
        Some(end) => (line.get(..=end)?, line.get(end + 1..)?),
        None => line.split_once(' ')?,
    };
    let value = value.split_whitespace().next()?.parse().ok()?;
    let (name, labels) = match head.split_once('{') {
        Some((name, rest)) => (name, parse_labels(rest.strip_suffix('}')?)?),
        None => (head, BTreeMap::new()),
    };
    Some(Sample { name: name.to_owned(), labels, value })
}

fn parse_labels(mut rest: &str) -> Option<BTreeMap<String, String>> {
    let mut labels = BTreeMap::new();
    while !rest.is_empty() {
        let (key, after) = rest.split_once("=\"")?;
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
        labels.insert(key.to_owned(), value);
        rest = after.get(end + 1..)?.trim_start_matches(',');
    }
    Some(labels)
}

#[cfg(test)]
mod tests {
    use super::Scrape;

    #[test]
    fn labels_with_quotes_and_braces_are_read() {
        let scrape = Scrape::parse("# TYPE x counter\nx{a=\"1\",b=\"q\\\"}\"} 2\nx{a=\"1\"} 3 1700000000\ny 4\n");
        assert_eq!(scrape.sum("x", &[("a", "1")]), 5.0);
        assert_eq!(scrape.sum("x", &[("b", "q\"}")]), 2.0);
        assert_eq!(scrape.sum("y", &[]), 4.0);
        assert!(!scrape.has("z"));
    }
}
