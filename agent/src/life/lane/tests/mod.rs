//! What must hold of the lane's decisions, against a kernel that is a table in memory.

mod fake;
mod handle;
mod property;
mod table;
