//! What must hold of any answer of a pod: it is refused whole, or what is told of it is an exposition in which nothing is another
//! pod's.

use super::{
    exposition::{Format, read},
    merge::merge,
};
use crate::life::limits;

/// An answer in either format, of a pod that is alone on its node, and beside one that says a little else.
pub fn exposition(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    // What is told has more labels than what was said.
    if text.lines().any(|line| line.matches('=').count() + 2 > limits::SCRAPE_LABELS) {
        return;
    }
    let other = read("# TYPE a counter\na 1\n# TYPE b histogram\nb_count 1\n", Format::Text, &[("pod", "other")]);
    let other = other.unwrap_or_default();
    for format in [Format::Text, Format::OpenMetrics] {
        let Ok(families) = read(text, format, &[("namespace", "shop"), ("pod", "we\"b\n")]) else { continue };
        let count = |families: &[super::Family]| families.iter().map(|family| family.samples.len()).sum::<usize>();
        let said = count(&families);
        let (told, dropped) = merge(&[families.clone(), other.clone()]);
        let again = read(&told, Format::Text, &[]).unwrap_or_else(|error| panic!("{error}:\n{told}"));
        let dropped: usize = dropped.iter().sum();
        assert_eq!(count(&again) + dropped, said + 2, "{told}");
        for line in told.lines().filter(|line| !line.starts_with('#')) {
            let labels = line.split_once('{').map_or("", |(_, labels)| labels);
            let own =
                labels.starts_with("namespace=\"shop\",pod=\"we\\\"b\\n\"") || labels.starts_with("pod=\"other\"");
            assert!(own, "{line}");
        }
        for family in &again {
            let types = told.matches(&format!("\n# TYPE {} ", family.name)).count();
            assert!(types <= 1, "{} is described {types} times", family.name);
        }
        assert_eq!(merge(&[families, other.clone()]).0, told, "the same again");
    }
}
