//! The netns of a pod, as the kernel names it.

use super::world::*;

#[test]
fn a_netns_has_one_cookie_and_no_other_has_it() {
    if !can_run("a_netns_has_one_cookie_and_no_other_has_it") {
        return;
    }
    let world = World::new();
    let cookie = world.pod().cookie().unwrap();
    assert_eq!(world.pod().cookie().unwrap(), cookie);
    assert_ne!(world.out().cookie().unwrap(), cookie);
    assert_ne!(cookie, 0);
}
