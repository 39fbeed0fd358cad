//! Steps for audiences: they come first, keep what they have, and lose it with everyone.

use canary_agent::config::model::Reaction;
use canary_agent::rollout::drive::{Stage, Wish};
use canary_ebpf_common::share::Share;

use crate::{World, bad, gated, only, rollout, share, step};

#[test]
fn an_audience_comes_first_and_keeps_its_share_until_everyone_has_it() {
    let steps = vec![
        only("staff", step("100%", 10)),
        only("beta", step("20%", 10)),
        step("5%", 10),
        step("50%", 10),
        step("100%", 0),
    ];
    let mut world = World::new(rollout(steps));
    world.look();
    let has = |world: &World| (world.share, world.has_of("staff"), world.has_of("beta"));
    assert_eq!(has(&world), (Share::ZERO, Share::ALL, Share::ZERO));
    world.wait(10);
    assert_eq!(has(&world), (Share::ZERO, Share::ALL, share("20%")));
    world.wait(10);
    assert_eq!(has(&world), (share("5%"), Share::ALL, share("20%")));
    world.restart(1_000);
    assert_eq!(has(&world), (share("5%"), Share::ALL, share("20%")));
    world.wait(11);
    assert_eq!(has(&world), (share("50%"), Share::ALL, share("50%")));
    world.wait(10);
    assert_eq!(world.run.stage(), Stage::Completed);
    assert_eq!(has(&world), (Share::ALL, Share::ALL, Share::ALL));
    assert!(world.run.position().audiences.is_empty());
}

#[test]
fn an_abort_takes_back_what_audiences_have_and_a_step_back_what_the_step_gave() {
    let steps =
        || vec![only("staff", step("50%", 0)), only("staff", gated("100%")), step("100%", 0)];
    let mut world = World::new(rollout(steps()));
    world.look();
    assert_eq!(world.has_of("staff"), Share::ALL);
    let wishes = world.run.ask_abort(None, world.at()).unwrap();
    assert!(matches!(wishes[0], Wish::Back(_)), "first of all");
    world.fulfil(wishes);
    assert_eq!((world.share, world.has_of("staff")), (Share::ZERO, Share::ZERO));
    // A gate fails.
    let mut one = rollout(steps());
    one.on_fail = Reaction::StepBack;
    let mut world = World::new(one);
    world.look();
    for _ in 0..3 {
        world.wait(1);
        world.answer(&bad());
    }
    assert_eq!((world.has_of("staff"), world.run.stage()), (share("50%"), Stage::Held));
    assert_eq!((world.share, world.step()), (Share::ZERO, 1));
    assert!(world.run.position().reason.as_ref().unwrap().contains("back to 0%, `staff` 50%"));
    // Everyone's share goes back, the audience keeps its own.
    let mut one =
        rollout(vec![only("staff", step("100%", 0)), step("5%", 0), gated("50%"), step("100%", 0)]);
    one.on_fail = Reaction::StepBack;
    let mut world = World::new(one);
    world.look();
    for _ in 0..3 {
        world.wait(1);
        world.answer(&bad());
    }
    assert_eq!((world.share, world.has_of("staff")), (share("5%"), Share::ALL));
    assert_eq!((world.step(), world.run.stage()), (2, Stage::Held));
}

#[test]
fn what_an_audience_has_goes_with_everyones_share_and_comes_back_with_the_step() {
    let steps = vec![only("staff", step("100%", 0)), step("5%", 100), step("100%", 0)];
    let mut world = World::new(rollout(steps));
    world.look();
    assert_eq!((world.share, world.has_of("staff")), (share("5%"), Share::ALL));
    // In need somebody takes everyone's share back by hand: that is meant for all.
    world.share = Share::ZERO;
    assert_eq!(world.has_of("staff"), Share::ZERO);
    world.wait(1);
    assert_eq!(world.run.stage(), Stage::Paused);
    assert!(world.run.position().reason.as_ref().unwrap().contains("`staff` (100%)"));
    world.share = share("5%");
    world.wait(1);
    assert_eq!(world.has_of("staff"), share("5%"), "nobody gives it again but a step");
    let wishes = world.run.ask_resume(&world.rollout.clone(), world.at()).unwrap();
    world.fulfil(wishes);
    world.look();
    assert_eq!((world.share, world.has_of("staff")), (share("5%"), Share::ALL));
    // A panic ends it, also one that finds nothing to take but the audience's, and also while it
    // stands.
    for stands in [false, true] {
        let steps = vec![only("staff", step("100%", 100)), step("100%", 0)];
        let mut world = World::new(rollout(steps));
        world.look();
        if stands {
            let wishes = world.run.ask_pause(None).unwrap();
            world.fulfil(wishes);
        }
        world.given.clear();
        world.wait(1);
        assert_eq!(world.run.stage(), Stage::Aborted);
        assert_eq!(world.has_of("staff"), Share::ZERO);
    }
}

#[test]
fn an_audience_that_no_step_names_any_more_has_what_everyone_has() {
    let steps = vec![only("staff", step("100%", 100)), step("100%", 0)];
    let mut world = World::new(rollout(steps));
    world.look();
    let other = rollout(vec![step("5%", 100), step("100%", 0)]);
    let wishes = world.run.reconfigure(Some(&other));
    world.rollout = other;
    world.fulfil(wishes);
    world.sync();
    assert_eq!((world.run.stage(), world.has_of("staff")), (Stage::Paused, Share::ZERO));
    let why = world.run.position().reason.clone().unwrap();
    assert!(why.contains("no step names `staff` (100%) any more"), "{why}");
    // The next agent says the same.
    world.restart(1_000);
    assert_eq!(world.run.stage(), Stage::Paused);
}
