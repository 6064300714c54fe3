// The clusters of the server in a cell.
import { ClusterPanel } from '../shared/components/clusters/cluster-panel';
import { panelWidget } from './panel-in-cell';

export default panelWidget((client, name) => <ClusterPanel client={client} name={name} />);
