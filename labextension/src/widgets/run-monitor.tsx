// The live view of a run in a cell, where no panel of JupyterLab shows it.
import { type Model, widget } from './host';

export default widget((model: Model) => <section class="llmc-card">{String((model.get('info') as { name?: string }).name)}</section>);
