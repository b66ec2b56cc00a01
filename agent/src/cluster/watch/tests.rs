use std::{fs, path::Path, sync::Arc, time::Duration};

use tokio::time::timeout;

use super::{Settings, Source};
use crate::cluster::{Snapshot, View};

/// What the directory holds is in force after this long at the latest, on a busy machine.
const SOON: Duration = Duration::from_secs(10);

fn pod(name: &str) -> String {
    format!("---\n{{apiVersion: v1, kind: Pod, metadata: {{name: {name}}}, status: {{podIP: 10.0.0.1}}}}\n")
}

fn start(directory: &Path) -> (View, Source) {
    Source::start(directory, Settings::default()).unwrap()
}

fn pods(snapshot: &Snapshot) -> Vec<&str> {
    let mut names: Vec<_> = snapshot.workloads.values().map(|workload| &*workload.name).collect();
    names.sort_unstable();
    names
}

async fn next(view: &mut View) -> Arc<Snapshot> {
    timeout(SOON, view.next()).await.expect("a snapshot in time").expect("the source goes on")
}

#[tokio::test]
async fn first_snapshot_is_whole_when_start_returns() {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("a.yaml"), pod("a")).unwrap();
    fs::write(folder.path().join("b.yaml"), "kind: [").unwrap();
    let (view, source) = start(folder.path());
    assert_eq!((pods(&view.load()), view.load().generation), (vec!["a"], 1));
    assert_eq!(source.problems().borrow().len(), 1);
}

#[tokio::test]
async fn directory_that_is_not_there_is_an_error() {
    let folder = tempfile::tempdir().unwrap();
    let error = Source::start(folder.path().join("none"), Settings::default()).unwrap_err();
    assert_eq!(error.reason(), "manifest_directory");
}

#[tokio::test]
async fn each_change_is_one_generation() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("a.yaml");
    let (mut view, _source) = start(folder.path());
    fs::write(&file, pod("a")).unwrap();
    let snapshot = next(&mut view).await;
    assert_eq!((pods(&snapshot), snapshot.generation), (vec!["a"], 2));
    // By rename.
    fs::write(folder.path().join("new"), pod("b")).unwrap();
    fs::rename(folder.path().join("new"), &file).unwrap();
    let snapshot = next(&mut view).await;
    assert_eq!((pods(&snapshot), snapshot.generation), (vec!["b"], 3));
    fs::remove_file(&file).unwrap();
    let snapshot = next(&mut view).await;
    assert_eq!((pods(&snapshot), snapshot.generation), (vec![], 4));
}

#[tokio::test]
async fn change_that_says_nothing_new_is_not_published() {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("a.yaml"), pod("a")).unwrap();
    let (mut view, _source) = start(folder.path());
    fs::write(folder.path().join("a.yaml"), format!("# again\n{}", pod("a"))).unwrap();
    assert!(timeout(Duration::from_secs(3), view.next()).await.is_err());
    fs::write(folder.path().join("a.yaml"), pod("b")).unwrap();
    assert_eq!(next(&mut view).await.generation, 2);
}

#[tokio::test]
async fn malformed_file_changes_the_problems_and_not_the_snapshot() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("a.yaml");
    fs::write(&file, pod("a")).unwrap();
    let (mut view, source) = start(folder.path());
    let mut problems = source.problems();
    fs::write(&file, "kind: [").unwrap();
    timeout(SOON, problems.changed()).await.unwrap().unwrap();
    assert_eq!(problems.borrow_and_update().len(), 1);
    assert_eq!((pods(&view.load()), view.load().generation), (vec!["a"], 1));
    fs::write(&file, pod("b")).unwrap();
    assert_eq!(pods(&*next(&mut view).await), ["b"]);
    timeout(SOON, problems.changed()).await.unwrap().unwrap();
    assert!(problems.borrow().is_empty());
}

#[tokio::test]
async fn directory_that_takes_anothers_place_is_followed() {
    let parent = tempfile::tempdir().unwrap();
    let path = parent.path().join("manifests");
    fs::create_dir(&path).unwrap();
    fs::write(path.join("a.yaml"), pod("a")).unwrap();
    let (mut view, _source) = start(&path);
    fs::rename(&path, parent.path().join("old")).unwrap();
    fs::create_dir(&path).unwrap();
    fs::write(path.join("b.yaml"), pod("b")).unwrap();
    let mut snapshot = next(&mut view).await;
    while pods(&snapshot) != ["b"] {
        snapshot = next(&mut view).await;
    }
    fs::write(path.join("c.yaml"), pod("c")).unwrap();
    assert_eq!(pods(&*next(&mut view).await), ["b", "c"]);
}

#[tokio::test]
async fn dropped_source_ends_its_view() {
    let folder = tempfile::tempdir().unwrap();
    let (mut view, source) = start(folder.path());
    drop(source);
    assert!(timeout(SOON, view.next()).await.expect("in time").is_none());
}
