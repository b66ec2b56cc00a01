//! What must hold of the agent's life.

mod admin;
mod config;
mod drain;
mod enrol;
mod readiness;
