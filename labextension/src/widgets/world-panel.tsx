// The ranks of a world in a cell.
import { WorldPanel } from '../shared/components/worlds/world-panel';
import { panelWidget } from './panel-in-cell';

export default panelWidget((client, worldId) => <WorldPanel client={client} worldId={worldId} />);
