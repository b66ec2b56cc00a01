//! What is shown: on the terminal as it happens, and kept for the page.

use std::{
    io::{IsTerminal, stdout},
    time::Duration,
};

/// One line of the story.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Line {
    /// A claim and whether it held.
    Check { good: bool, claim: String, detail: String },
    /// Said in passing.
    Note(String),
    /// Output of a program, or lines of a log, as they are.
    Quote(Vec<String>),
}

/// A part of the story.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Scene {
    pub title: String,
    pub lines: Vec<Line>,
}

/// Everything that was shown.
#[derive(Debug)]
pub struct Report {
    pub scenes: Vec<Scene>,
    pub headline: String,
    pub took: Duration,
    colours: bool,
}

impl Report {
    pub fn new() -> Self {
        let colours = stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none();
        Self { scenes: Vec::new(), headline: String::new(), took: Duration::ZERO, colours }
    }

    fn paint(&self, code: &str, text: &str) -> String {
        if self.colours { format!("\x1b[{code}m{text}\x1b[0m") } else { text.to_owned() }
    }

    pub fn headline(&mut self, text: &str) {
        text.clone_into(&mut self.headline);
        println!("{}", self.paint("1", text));
    }

    pub fn scene(&mut self, title: &str) {
        let number = self.scenes.len() + 1;
        println!("\n{}", self.paint("1;36", &format!("{number}. {title}")));
        self.scenes.push(Scene { title: title.to_owned(), lines: Vec::new() });
    }

    /// A claim; `detail` is what was seen. Gives `good`.
    pub fn check(&mut self, good: bool, claim: &str, detail: &str) -> bool {
        let mark = if good { self.paint("32", "✓") } else { self.paint("1;31", "✗") };
        let seen = if detail.is_empty() { String::new() } else { self.paint("2", &format!("  {detail}")) };
        println!("   {mark} {claim}{seen}");
        self.push(Line::Check { good, claim: claim.to_owned(), detail: detail.to_owned() });
        good
    }

    pub fn note(&mut self, text: &str) {
        println!("     {text}");
        self.push(Line::Note(text.to_owned()));
    }

    pub fn quote(&mut self, lines: Vec<String>) {
        for line in &lines {
            println!("     {}", self.paint("2", &format!("│ {line}")));
        }
        self.push(Line::Quote(lines));
    }

    fn push(&mut self, line: Line) {
        if self.scenes.is_empty() {
            self.scenes.push(Scene::default());
        }
        if let Some(scene) = self.scenes.last_mut() {
            scene.lines.push(line);
        }
    }

    /// How many checks held, and how many did not.
    pub fn counts(&self) -> (usize, usize) {
        let checks = || self.scenes.iter().flat_map(|scene| &scene.lines);
        let good = checks().filter(|line| matches!(line, Line::Check { good: true, .. })).count();
        let bad = checks().filter(|line| matches!(line, Line::Check { good: false, .. })).count();
        (good, bad)
    }

    pub fn good(&self) -> bool {
        self.counts().1 == 0
    }

    pub fn finish(&mut self, took: Duration) {
        self.took = took;
        let (good, bad) = self.counts();
        let text = format!("{good} checks held, {bad} did not, in {:.1} s", took.as_secs_f64());
        println!("\n{}", self.paint(if bad == 0 { "1;32" } else { "1;31" }, &text));
    }
}
