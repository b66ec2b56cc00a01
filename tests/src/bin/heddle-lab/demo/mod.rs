//! The demonstration: two nodes, real software, and each of heddle's claims shown on its traffic.
//!
//! Every check mark is computed from what was seen just then; one that fails makes the whole run fail.

mod html;
mod report;
mod scenes;
mod stage;

use std::{
    fs,
    io::{IsTerminal, stdin},
    path::Path,
    process::{ExitCode, exit},
    thread,
    time::Instant,
};

use anyhow::{Context, Result};
use heddle_lab::state::Claim;

use report::Report;
use stage::Stage;

/// Runs it from the first pod to the proof that nothing is left.
pub fn run(keep: bool, page: Option<&Path>) -> Result<ExitCode> {
    let begun = Instant::now();
    let mut report = Report::new();
    report.headline("heddle: two nodes, six pods of real software, one mesh");
    let stage = Stage::build(&mut report)?;
    remove_on_interrupt(stage.lab.claim().clone())?;
    let topology = stage.topology();
    let shown = scenes::all(&stage, &mut report);
    if let Err(error) = &shown {
        report.check(false, "the demonstration ran to its end", &format!("{error:#}"));
    }
    if !report.good() {
        stage.lab.print_logs();
    }
    let ended = if keep { stage.keep(&mut report) } else { scenes::removal(stage, &mut report) };
    if let Err(error) = ended {
        report.check(false, "it came to its end", &format!("{error:#}"));
    }
    report.finish(begun.elapsed());
    if let Some(page) = page {
        fs::write(page, html::page(&report, &topology)).with_context(|| format!("writing {}", page.display()))?;
        println!("The same as a page: {}", page.display());
    }
    Ok(if report.good() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// The topology with the mesh running, to look around in.
pub fn up() -> Result<ExitCode> {
    let mut report = Report::new();
    let stage = Stage::build(&mut report)?;
    remove_on_interrupt(stage.lab.claim().clone())?;
    stage.enrol()?;
    stage.look_around();
    println!("\nPress Enter (or Ctrl-C) to remove all of it.");
    if stdin().is_terminal() {
        stdin().read_line(&mut String::new())?;
    } else {
        // Nobody can press Enter: until a signal comes.
        loop {
            thread::park();
        }
    }
    stage.lab.remove()?;
    Ok(ExitCode::SUCCESS)
}

/// Ctrl-C and SIGTERM remove the lab and end the process.
fn remove_on_interrupt(claim: Claim) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let mut terminate = {
        let _entered = runtime.enter();
        tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate())?
    };
    thread::spawn(move || {
        runtime.block_on(async {
            tokio::select! {
                _ = tokio::signal::ctrl_c() => {}
                _ = terminate.recv() => {}
            }
        });
        eprintln!("\ninterrupted: removing the lab");
        if let Err(error) = claim.release() {
            eprintln!("{error:#}");
        }
        // What the main thread made in the meantime is swept by `cargo xtask`, or by the next lab.
        exit(130);
    });
    Ok(())
}
