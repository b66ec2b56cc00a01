//! The CNI plugin: a program of its own, small and without a runtime, that container runtimes start for each pod.

use std::process::ExitCode;

fn main() -> ExitCode {
    heddle::cni::plugin::main()
}
