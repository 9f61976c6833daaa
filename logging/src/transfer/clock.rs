//! The task `clock`.

use common::api::timestamp;

use super::{known, read_with_retries};
use crate::map::DistributedMap;

/// Prints both clocks; with `--forward` first moves the map's ahead to the machine's.
///
/// # Errors
/// When the map's clock cannot be read or moved.
pub(super) async fn show(map: &dyn DistributedMap, forward: bool) -> anyhow::Result<()> {
    let mut clocks = known(map, || map.clocks()).await?;
    if forward {
        // On Redis the clock of this process alone may have begun there already.
        let forward = clocks.machine.max(clocks.map);
        read_with_retries(map, async || map.settle(forward).await).await?;
        clocks = known(map, || map.clocks()).await?;
    }
    println!("map      {}", timestamp(clocks.map));
    println!("machine  {}", timestamp(clocks.machine));
    Ok(())
}
