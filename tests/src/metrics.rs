//! A scrape of `/metrics`, parsed: samples by name and labels.

/// As `heddle ca rotate` reads it.
#[path = "../../agent/src/identity/ca/rotate/exposition.rs"]
mod exposition;

pub use exposition::Sample;

/// Everything of one scrape.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Scrape(pub Vec<Sample>);

impl Scrape {
    /// Parses the Prometheus text format; lines that are no samples are passed over.
    #[must_use]
    pub fn parse(text: &str) -> Self {
        Self(text.lines().filter_map(exposition::sample).collect())
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
